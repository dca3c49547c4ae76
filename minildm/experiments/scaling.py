"""The second stage against its size, its data and its seconds."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from minildm.conditioning import Tokenizer
from minildm.data import pick_device, seeded
from minildm.diffusion import make_schedule
from minildm.experiments.common import (
    SEED,
    captioned_mnist,
    draw,
    held_out,
    kept,
    learning_curve,
    quality,
    real_frechet,
)
from minildm.pipeline import LatentDiffusion, LDMConfig, SecondStage, encode_all
from minildm.recipes import RECIPES

CHANNELS = (24, 48, 96)
IMAGES = (60, 600, 6000, 60_000)
LOSS_STEPS = range(50, 1000, 100)


def scaling(work: Path, seconds: float, samples: int) -> dict:
    """The second stage against size, data and seconds: the content of scaling.json.

    "sizes": UNets of 24, 48 and 96 channels on the latents of mnist-text, trained for `seconds`; after an eighth, a
    quarter, a half and all of them, the loss on `samples` test images and the quality of as many drawings. "data": the
    middle size on the first 60, 600, 6000 and all training images, for half as long; the loss on test images and on
    those that it was trained on. real_frechet: the Fréchet distance of as many real training images.
    """
    model = LatentDiffusion.from_pretrained("mnist-text").to(pick_device())
    (data, words), test = captioned_mnist(), held_out(samples)
    captions, batch_size = words.captions(data.x_train, data.y_train), RECIPES["mnist-text"].second.batch_size
    latents, unseen = (
        model.autoencoder.standardise(encode_all(model.autoencoder, x)) for x in (data.x_train, data.x_test[:samples])
    )

    def size(channels: int) -> dict:
        config = replace(model.config, unet=replace(model.config.unet, channels=channels))

        def measure(second_stage: SecondStage) -> dict:
            images = draw(second_stage, config, test.prompts, model.latent_shape, model.decode)
            return {"test_loss": fixed_loss(second_stage, config, unseen, test.prompts), **quality(images, test)}

        shares = (1 / 8, 1 / 4, 1 / 2, 1)
        print(f"{channels} channels", flush=True)
        curve = learning_curve(config, latents, captions, seconds, measure, shares, batch_size)
        return {"channels": channels, "samples": samples, **curve, "real_frechet": real_frechet(test)}

    def amount(images: int) -> dict:
        seen = latents[:images]

        def measure(second_stage: SecondStage) -> dict:
            part, prompts = seen[:samples], captions[: min(images, samples)]
            return {
                "test_loss": fixed_loss(second_stage, model.config, unseen, test.prompts),
                "train_loss": fixed_loss(second_stage, model.config, part, prompts),
            }

        print(f"{images} training images", flush=True)
        return {"images": len(seen), "samples": samples} | learning_curve(
            model.config, seen, captions, seconds / 2, measure, batch_size=batch_size
        )

    return {
        "sizes": [kept(work / f"channels-{channels}.json", lambda c=channels: size(c)) for channels in CHANNELS],
        "data": [kept(work / f"images-{images}.json", lambda n=images: amount(n)) for images in IMAGES],
    }


@torch.no_grad()
def fixed_loss(model: SecondStage, config: LDMConfig, latents: torch.Tensor, prompts: list[str]) -> float:
    """The loss (LDM eq. 3) on latents (N, C, h, w) with their whole prompts, at ten even steps t = 50, 150, …, 950.

    Always with the same noise, so that two models differ by what they predict and not by what they were asked.
    """
    schedule = make_schedule(config.schedule, beta_start=config.beta_start, beta_end=config.beta_end)
    device = pick_device()
    eps = torch.randn(latents.shape, generator=seeded(SEED)).to(device)
    tokens, z = Tokenizer(config.words).encode(prompts).to(device), latents.to(device)
    losses = []
    for step in LOSS_STEPS:
        t = torch.full((len(z),), step, device=device)
        predictions = model(schedule.add_noise(z, step, eps), t, tokens)
        losses.append(F.mse_loss(predictions, schedule.target(config.target, z, step, eps)))
    return round(torch.stack(losses).mean().item(), 5)
