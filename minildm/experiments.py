"""The paper's experiments in miniature: `python -m minildm experiment NAME` writes a file in data/results."""

import json
import os
import platform
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minildm.conditioning import Tokenizer
from minildm.data import StrokeWords, drop_words, load_mnist, pick_device, seeded, to_float, write_atomically
from minildm.diffusion import diffusion_loss, make_schedule
from minildm.judge import frechet_distance, predict
from minildm.pipeline import LDMConfig, SecondStage, encode_all
from minildm.recipes import (
    RECIPES,
    evaluate_first_stage,
    first_stage_recipe,
    load_autoencoder,
    load_features,
    load_judge,
    train_autoencoder,
)
from minildm.sampling import denoiser, sample, timesteps
from minildm.training import Budget, TrainState, batch_indices, train
from minildm.unet import UNetConfig

FACTORS = (1, 2, 4, 8)
SEED = 0
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


EXPERIMENTS = {"first-stage": first_stage}


def run_experiment(name: str, out: Path, work: Path, seconds: float, samples: int) -> None:
    """Run one of EXPERIMENTS and write its result with seed, machine and time to `out`; goes on from what `work` keeps.

    Raises ValueError for an unknown name, or a folder that keeps parts of a run with other settings.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f'there is no experiment "{name}": choose one of {", ".join(EXPERIMENTS)}.')
    if not 8 <= samples <= 10_000:
        raise ValueError(f"measure on 8 to 10,000 samples, not {samples}.")
    settings = {"experiment": name, "seconds": seconds, "samples": samples, "seed": SEED}
    if {key: kept(work / "settings.json", lambda: settings)[key] for key in settings} != settings:
        raise ValueError(f"{work} keeps parts of a run with other settings: give another folder with --work.")
    result = EXPERIMENTS[name](work, seconds, samples)
    about = settings | {
        "command": f"python -m minildm experiment {name} --seconds {seconds:g} --samples {samples}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, {pick_device()}",
        "torch": torch.__version__,
        "wall_clock": sum(part["wall_clock"] for parts in result.values() for part in parts),
    }
    write_atomically(out, lambda file: file.write_text(json.dumps({"about": about, **result}, indent=1) + "\n"))


def kept(path: Path, measure: Callable[[], dict]) -> dict:
    """What the JSON file holds; if there is none yet, what `measure()` returns and its seconds, written to it first."""
    if not path.exists():
        start = time.monotonic()
        result = measure() | {"wall_clock": round(time.monotonic() - start)}
        write_atomically(path, lambda file: file.write_text(json.dumps(result, indent=1)))
    return json.loads(path.read_text())


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


def space(
    factor: int, images: torch.Tensor, folder: Path
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The standardised latents (N, C, h, w) of uint8 images, and the way back; for factor 1 they are the pixels."""
    if factor == 1:
        pixels = to_float(images)
        mean, std = pixels.mean(), pixels.std()
        return (pixels - mean) / std, lambda z: (z * std + mean).clamp(-1, 1)
    autoencoder = load_autoencoder(folder).to(pick_device())
    raw = encode_all(autoencoder, images)
    return autoencoder.standardise(raw), lambda z: autoencoder.from_latents(z).clamp(-1, 1)


def unet_config(factor: int, channels: int) -> UNetConfig:
    """The UNet for the latents of one factor, with a transformer on its lowest level, which is 4×4 for each factor."""
    multipliers = UNET_MULTIPLIERS[factor]
    attention = (*[False] * (len(multipliers) - 1), True)
    return UNetConfig(channels, channels, 32, multipliers, attention=attention, context_dim=64, groups=8)


def second_stage_curve(work: Path, factor: int, seconds: float, samples: int) -> dict:
    """Train a second stage in the space of one factor, and measure it after a quarter, a half and all of the time."""
    data = load_mnist()
    words = StrokeWords.measure(data.x_train, data.y_train)
    latents, to_images = space(factor, data.x_train, work / f"f{factor}-kl")
    config = replace(RECIPES["mnist-text"].config, unet=unet_config(factor, latents.shape[1]))
    torch.manual_seed(SEED)
    model = SecondStage(config).to(pick_device(), memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"second stage f = {factor}: {parameters:,} parameters", flush=True)
    captions = words.captions(data.x_train, data.y_train)
    snapshots = train_with_snapshots(model, latents, captions, config, seconds)

    judge, prompts = load_judge(), words.captions(data.x_test[:samples], data.y_test[:samples])
    _, real = predict(judge, to_float(data.x_test[:samples]))
    points = []
    for elapsed, step, snapshot in snapshots:
        images = draw(snapshot, config, prompts, latents.shape[1:], to_images)
        read, features = predict(judge, images)
        accuracy = (read == data.y_test[:samples]).float().mean().item()
        points.append((round(elapsed, 1), step, round(frechet_distance(features, real), 3), round(accuracy, 4)))
        print("  after {:.0f} s, step {}: Fréchet distance {}, read as asked {}".format(*points[-1]), flush=True)
    curve = dict(zip(("seconds", "steps", "frechet", "accuracy"), map(list, zip(*points, strict=True)), strict=True))
    return {"factor": factor, "parameters": parameters, "samples": samples, **curve}


def train_with_snapshots(
    model: SecondStage, latents: torch.Tensor, captions: list[str], config: LDMConfig, seconds: float
) -> list[tuple[float, int, nn.Module]]:
    """Train for `seconds`; (elapsed, step, averaged model) after a quarter, a half and all of them."""
    stage, tokenizer = RECIPES["mnist-text"].second, Tokenizer(config.words)
    schedule, device = make_schedule(config.schedule), pick_device()

    def loss_fn(model: SecondStage, generator: torch.Generator) -> torch.Tensor:
        index = batch_indices(len(latents), stage.batch_size, generator)
        tokens = tokenizer.encode(drop_words([captions[i] for i in index.tolist()], generator)).to(device)
        return diffusion_loss(model, schedule, latents[index].to(device), generator, config.target, tokens=tokens)

    state = TrainState.start(model, stage.lr, SEED, stage.weight_decay, stage.ema_decay)
    marks, snapshots = [seconds / 4, seconds / 2, seconds], []
    for _ in train(state, loss_fn, Budget(seconds=seconds), stage.lr):
        while marks and state.elapsed >= marks[0]:
            del marks[0]
            snapshots.append((state.elapsed, state.step, deepcopy(state.ema.model)))
    return snapshots


@torch.no_grad()
def draw(
    model: SecondStage, config: LDMConfig, prompts: list[str], shape: torch.Size, to_images: Callable, batch: int = 100
) -> torch.Tensor:
    """One image (1, 32, 32) for each prompt, 20 DDIM steps without guidance: (N, 1, 32, 32) in [-1, 1] on the CPU."""
    schedule, tokenizer, device, images = make_schedule(config.schedule), Tokenizer(config.words), pick_device(), []
    for start in range(0, len(prompts), batch):
        part, generator = prompts[start : start + batch], seeded(start)
        tokens = tokenizer.encode(part).to(device)
        denoise = denoiser(partial(model, tokens=tokens), schedule, config.target)
        z = torch.randn(len(part), *shape, generator=generator).to(device)
        for z in sample(denoise, schedule, z, timesteps(schedule, 20), generator):  # noqa: B007, B020
            pass
        images.append(to_images(z).cpu())
    return torch.cat(images)
