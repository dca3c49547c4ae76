"""What compression costs, and what it buys."""

from dataclasses import replace
from pathlib import Path

from minildm.data import pick_device
from minildm.experiments.common import captioned_mnist, draw, held_out, kept, learning_curve, quality, space
from minildm.recipes import (
    RECIPES,
    evaluate_first_stage,
    first_stage_recipe,
    load_autoencoder,
    load_features,
    load_judge,
    train_autoencoder,
)
from minildm.training import Budget
from minildm.unet import UNetConfig

FACTORS = (1, 2, 4, 8)
UNET_MULTIPLIERS = {1: (1, 1, 1, 2), 2: (1, 1, 2), 4: (1, 2), 8: (2,)}  # the lowest level is 4×4 for every factor


def first_stage(work: Path, seconds: float, samples: int) -> dict:
    """What compression costs and what it buys (LDM table 8 and figure 6): the content of first_stage.json.

    "rows": each first stage of factor 1, 2, 4, 8, KL and VQ, trained for `seconds` and measured on `samples` test
    images. "second_stage": for each factor a text-to-image UNet trained for twice as long on the latents of its KL
    first stage (factor 1: on the pixels themselves); after a quarter, a half and all of that time, the Fréchet distance
    and the share read as asked for of samples/4 drawings. Every part that is done is kept in the folder `work`.
    """
    rows = [
        kept(work / f"f{factor}-{kind}.json", lambda f=factor, k=kind: first_stage_row(work, f, k, seconds, samples))
        for factor in FACTORS
        for kind in ("kl", "vq")
    ]
    curves = [
        kept(work / f"f{factor}-second.json", lambda f=factor: second_stage_curve(work, f, 2 * seconds, samples // 4))
        for factor in FACTORS
    ]
    return {"rows": rows, "second_stage": curves}


def first_stage_row(work: Path, factor: int, kind: str, seconds: float, samples: int) -> dict:
    """Train one first stage for `seconds` and measure it on the first `samples` test images."""
    folder, recipe = work / f"f{factor}-{kind}", first_stage_recipe(factor, kind)
    print(f"first stage f = {factor}, {kind}", flush=True)
    made = train_autoencoder(recipe, folder, Budget(seconds=seconds), resume=True)
    autoencoder = load_autoencoder(folder).to(pick_device())
    figures = evaluate_first_stage(autoencoder, load_judge(), load_features().to(pick_device()), samples)
    names = ("psnr", "ssim", "perceptual", "rfid", "nats_per_latent", "bits_per_latent", "code_use", "perplexity")
    return {
        "factor": factor,
        "kind": kind,
        "latent_channels": recipe.config.latent_channels,
        "parameters": sum(p.numel() for p in autoencoder.parameters()),
        "train_seconds": made["seconds"],
        "train_steps": made["steps"],
        **{name: round(figures[name], 4) if name in figures else None for name in names},
    }


def unet_config(factor: int, channels: int) -> UNetConfig:
    """The UNet for the latents of one factor, with a transformer on its lowest level, which is 4×4 for each factor.

    It hears time and prompt as that of the recipe mnist-text does.
    """
    multipliers = UNET_MULTIPLIERS[factor]
    attention = (*[False] * (len(multipliers) - 1), True)
    return UNetConfig(
        in_channels=channels,
        out_channels=channels,
        channels=32,
        multipliers=multipliers,
        attention=attention,
        context_dim=64,
        groups=8,
        scale_shift=True,
        pooled=True,
    )


def second_stage_curve(work: Path, factor: int, seconds: float, samples: int) -> dict:
    """Train a second stage in the space of one factor, and measure it after a quarter, a half and all of the time."""
    (data, words), test = captioned_mnist(), held_out(samples)
    print(f"second stage f = {factor}", flush=True)
    latents, to_images = space(factor, data.x_train, work / f"f{factor}-kl")
    config = replace(RECIPES["mnist-text"].config, unet=unet_config(factor, latents.shape[1]))
    curve = learning_curve(
        config,
        latents,
        words.captions(data.x_train, data.y_train),
        seconds,
        lambda model: quality(draw(model, config, test.prompts, latents.shape[1:], to_images), test),
    )
    return {"factor": factor, "samples": samples, **curve}
