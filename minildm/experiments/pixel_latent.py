"""Pixels against latents, at equal wall clock and about equal parameters."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from minildm.experiments.common import (
    BATCH,
    captioned_mnist,
    draw,
    held_out,
    kept,
    learning_curve,
    quality,
    real_frechet,
    space,
)
from minildm.experiments.first_stage import unet_config
from minildm.pipeline import SecondStage
from minildm.recipes import RECIPES
from minildm.unet import UNetConfig

FIRST_STAGE = "mnist-kl-f4"
UNETS: dict[int, UNetConfig] = {
    1: replace(unet_config(1, 1), channels=28, groups=4),  # four levels, 32×32 to 4×4
    4: unet_config(4, 4),  # two levels, 8×8 and 4×4
}


def pixel_latent(work: Path, seconds: float, samples: int) -> dict:
    """Pixels against latents at equal wall clock and parameters (LDM table 6): the content of pixel_latent.json.

    "rows": a text-to-image UNet on the pixels (factor 1) and one on the latents of the shipped first stage (factor 4),
    each trained for `seconds`; after a quarter, a half and all of them, throughput and the quality of `samples`
    drawings. encode_seconds: what making the latents of all training images took, before that time began.
    real_frechet: the Fréchet distance of as many real training images.
    """
    rows = [kept(work / f"f{factor}.json", lambda f=factor: row(f, seconds, samples)) for factor in UNETS]
    return {"rows": rows}


def row(factor: int, seconds: float, samples: int) -> dict:
    """Train a second stage in the space of one factor; its curves, with images a second in training and in sampling."""
    (data, words), test = captioned_mnist(), held_out(samples)
    print(f"factor {factor}", flush=True)
    start = time.monotonic()
    latents, to_images = space(factor, data.x_train, FIRST_STAGE)
    encode_seconds = time.monotonic() - start
    config = replace(RECIPES["mnist-text"].config, unet=UNETS[factor])

    def measure(model: SecondStage) -> dict:
        start = time.monotonic()
        images = draw(model, config, test.prompts, latents.shape[1:], to_images)
        return {"sampled_per_second": round(len(images) / (time.monotonic() - start), 2), **quality(images, test)}

    curve = learning_curve(config, latents, words.captions(data.x_train, data.y_train), seconds, measure)
    steps_per_second = torch.tensor(curve["steps"]) / torch.tensor(curve["seconds"])
    return {
        "factor": factor,
        "samples": samples,
        "encode_seconds": round(encode_seconds, 1),
        **curve,
        "steps_per_second": [round(rate, 3) for rate in steps_per_second.tolist()],
        "trained_per_second": [round(rate, 2) for rate in (BATCH * steps_per_second).tolist()],
        "real_frechet": real_frechet(test),
    }
