"""What the experiments share: parts kept on disk, short trainings looked at on the way, samples and their figures."""

import json
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minildm.conditioning import Tokenizer
from minildm.data import (
    DataError,
    ImageData,
    StrokeWords,
    drop_words,
    load_mnist,
    pick_device,
    seeded,
    to_float,
    write_atomically,
)
from minildm.diffusion import diffusion_loss, make_schedule
from minildm.judge import frechet_distance, predict
from minildm.metrics import Reference, measure
from minildm.muon import start_muon
from minildm.pipeline import LDMConfig, SecondStage, encode_all
from minildm.recipes import RECIPES, load_autoencoder, load_judge
from minildm.sampling import denoiser, sample, timesteps
from minildm.training import Budget, batch_indices, train

SEED = 0
BATCH = 32  # images a step of the short trainings: the pixels, where a step is slow, should take more than a few


def kept(path: Path, measure: Callable[[], dict]) -> dict:
    """What the JSON file holds; if there is none yet, what `measure()` returns and its seconds, written to it first."""
    if not path.exists():
        start = time.monotonic()
        result = measure() | {"wall_clock": round(time.monotonic() - start)}
        write_atomically(path, lambda file: file.write_text(json.dumps(result, indent=1)))
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise DataError(f"{path} is damaged: delete it and measure that part again.") from None


def captioned_mnist() -> tuple[ImageData, StrokeWords]:
    """MNIST, and the words for its strokes measured on the training images."""
    data = load_mnist()
    return data, StrokeWords.measure(data.x_train, data.y_train)


@dataclass(frozen=True)
class HeldOut:
    """n test images: what samples are asked for, and what they are held against.

    Their captions, labels (n,), thirds of thickness and slant, each (n,), and the reference made of them; and as many
    training images `real` (n, 1, 32, 32) uint8, for comparison.
    """

    prompts: list[str]
    labels: torch.Tensor
    thirds: tuple[torch.Tensor, torch.Tensor]
    reference: Reference
    real: torch.Tensor


def held_out(samples: int, digits: tuple[int, ...] = tuple(range(10))) -> HeldOut:
    """The first `samples` test images, of these digits only; fewer if there are fewer."""
    data, words = captioned_mnist()
    test, real = (torch.isin(y, torch.tensor(digits)).nonzero()[:, 0] for y in (data.y_test, data.y_train))
    test, real = test[:samples], real[:samples]
    images, labels = data.x_test[test], data.y_test[test]
    reference = Reference.of(images, data.x_train, words, load_judge())
    return HeldOut(
        words.captions(images, labels), labels, words.thirds(images, labels), reference, data.x_train[real[: len(test)]]
    )


def figures(images: torch.Tensor, test: HeldOut) -> dict[str, float]:
    """What `metrics.measure` says of images (n, 1, 32, 32) in [-1, 1] drawn for the prompts, under shorter names."""
    names = {"prompt_accuracy": "accuracy", f"frechet_distance_{len(images)}": "frechet_distance"}
    measured = measure(images, test.labels, test.thirds, test.reference)
    return {names.get(name, name): round(value, 4) for name, value in measured.items()}


def drawn_figures(draw: Callable[[], torch.Tensor], test: HeldOut) -> dict[str, float]:
    """The figures of the images that `draw()` returns, and the seconds that it took."""
    start = time.monotonic()
    images = draw()
    seconds = time.monotonic() - start
    row = figures(images, test) | {"seconds": round(seconds, 1)}
    print("  " + ", ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)
    return row


def real_figures(test: HeldOut) -> dict[str, float]:
    """The distances of as many real training images to the test images: about what a perfect model would get."""
    measured = figures(to_float(test.real), test)
    return {name: measured[name] for name in ("frechet_distance", "kid", "kid_error", "precision", "recall")}


def real_frechet(test: HeldOut) -> float:
    """The Fréchet distance of as many real training images to the test images."""
    _, features = predict(test.reference.judge, to_float(test.real))
    return round(frechet_distance(features, test.reference.features), 3)


def quality(images: torch.Tensor, test: HeldOut) -> dict[str, float]:
    """Of images (n, 1, 32, 32): their Fréchet distance to the test images, and the share read as asked for."""
    read, features = predict(test.reference.judge, images)
    accuracy = (read == test.labels).float().mean().item()
    return {"frechet": round(frechet_distance(features, test.reference.features), 3), "accuracy": round(accuracy, 4)}


def space(
    factor: int, images: torch.Tensor, name: Path | str
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The standardised latents (N, C, h, w) of uint8 images by the first stage `name`, and the way back.

    For factor 1 the latents are the pixels, and there is no first stage.
    """
    if factor == 1:
        pixels = to_float(images)
        mean, std = pixels.mean(), pixels.std()
        return (pixels - mean) / std, lambda z: (z * std + mean).clamp(-1, 1)
    autoencoder = load_autoencoder(name).to(pick_device())
    raw = encode_all(autoencoder, images)
    return autoencoder.standardise(raw), lambda z: autoencoder.from_latents(z).clamp(-1, 1)


def learning_curve(
    config: LDMConfig,
    latents: torch.Tensor,
    captions: list[str],
    seconds: float,
    measure: Callable[[SecondStage], dict],
    shares: tuple[float, ...] = (1 / 4, 1 / 2, 1),
    batch_size: int = BATCH,
) -> dict:
    """Train a fresh second stage on latents (N, C, h, w) for `seconds`; after each share of them, `measure(model)`.

    Returns the number of parameters, and a list, with a value for each share, of seconds, steps and every figure.
    """
    torch.manual_seed(SEED)
    model = SecondStage(config).to(pick_device(), memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"  {parameters:,} parameters, {len(latents):,} images", flush=True)
    points = []
    for elapsed, step, snapshot in train_with_snapshots(model, latents, captions, config, seconds, shares, batch_size):
        points.append({"seconds": round(elapsed, 1), "steps": step, **measure(snapshot)})
        print("  after", ", ".join(f"{value:g} {name}" for name, value in points[-1].items()), flush=True)
    return {"parameters": parameters} | {name: [point[name] for point in points] for name in points[0]}


def train_with_snapshots(
    model: SecondStage,
    latents: torch.Tensor,
    captions: list[str],
    config: LDMConfig,
    seconds: float,
    shares: tuple[float, ...],
    batch_size: int = BATCH,
) -> list[tuple[float, int, nn.Module]]:
    """Train for `seconds`; (elapsed, step, averaged model) after each share of them."""
    recipe, tokenizer = RECIPES["mnist-text"], Tokenizer(config.words)
    schedule = make_schedule(config.schedule, beta_start=config.beta_start, beta_end=config.beta_end)
    stage, draws, device = recipe.second, recipe.logit_normal, pick_device()

    def loss_fn(model: SecondStage, generator: torch.Generator) -> torch.Tensor:
        index = batch_indices(len(latents), batch_size, generator)
        tokens = tokenizer.encode(drop_words([captions[i] for i in index.tolist()], generator)).to(device)
        z = latents[index].to(device)
        return diffusion_loss(model, schedule, z, generator, config.target, draws, tokens=tokens)

    state = start_muon(model, stage.lr, SEED, stage.ema_decay)
    marks, snapshots = [share * seconds for share in shares], []
    for _ in train(state, loss_fn, Budget(seconds=seconds), stage.lr):
        while marks and state.elapsed >= marks[0]:
            del marks[0]
            snapshots.append((state.elapsed, state.step, deepcopy(state.ema.model)))
    return snapshots


@torch.no_grad()
def draw(
    model: SecondStage,
    config: LDMConfig,
    prompts: list[str],
    shape: tuple[int, ...],
    to_images: Callable,
    steps: int = 20,
    walk: Callable = sample,
    batch: int = 100,
) -> torch.Tensor:
    """One image (1, 32, 32) for each prompt, without guidance: (N, 1, 32, 32) in [-1, 1] on the CPU.

    `walk(denoise, schedule, x, steps, generator)` is a sampler such as `sample`, whose default is DDIM.
    """
    schedule = make_schedule(config.schedule, beta_start=config.beta_start, beta_end=config.beta_end)
    tokenizer, device, images = Tokenizer(config.words), pick_device(), []
    for start in range(0, len(prompts), batch):
        part, generator = prompts[start : start + batch], seeded(start)
        tokens = tokenizer.encode(part).to(device)
        denoise = denoiser(partial(model, tokens=tokens), schedule, config.target)
        z = torch.randn(len(part), *shape, generator=generator).to(device)
        for z in walk(denoise, schedule, z, timesteps(schedule, steps), generator):  # noqa: B007, B020
            pass
        images.append(to_images(z).cpu())
    return torch.cat(images)
