"""How fast this machine trains and samples, measured in one run: `python -m minildm bench`."""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minildm.data import pick_device
from minildm.losses import first_stage_loss_fn
from minildm.muon import start_muon
from minildm.pipeline import LatentDiffusion, second_stage_loss_fn
from minildm.recipes import RECIPES
from minildm.training import Budget, train

PROMPT = "a thick slanted seven"


def stopwatch(work: Callable[[], object]) -> float:
    """The seconds that `work()` takes, on a GPU to its end."""
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """The median wall clock of `work()` over `repeats` runs, after one that warms up."""
    return statistics.median([stopwatch(work) for _ in range(repeats + 1)][1:])


def convolution_throughput(batch: int = 128, channels: int = 128, size: int = 8) -> float:
    """GFLOP/s of a 3×3 convolution, forward and backward, on this machine (a multiply and an add are two)."""
    device = pick_device()
    x, weight = torch.randn(batch, channels, size, size), torch.randn(channels, channels, 3, 3)
    x, weight = (v.to(device, memory_format=torch.channels_last).requires_grad_() for v in (x, weight))
    seconds = median_seconds(lambda: F.conv2d(x, weight, padding=1).sum().backward())
    return 3 * 2 * batch * size**2 * channels**2 * 9 / seconds / 1e9


def peak_megabytes() -> float:
    """The most memory that this process has held (Linux counts kilobytes, macOS bytes); nan on Windows."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def stage_step(model, loss_fn: Callable, lr: float) -> Callable[[], object]:
    """One whole training step (loss, gradients, optimiser, EMA) as a function to time."""
    steps = train(start_muon(model.requires_grad_(True), lr, seed=0), loss_fn, Budget(steps=10_000), lr)
    return lambda: next(steps)


def run() -> dict[str, float]:
    """All figures by name, for the recipe mnist-text on random data."""
    recipe, device = RECIPES["mnist-text"], pick_device()
    torch.manual_seed(0)
    model = LatentDiffusion(recipe.config).to(device)
    model.autoencoder.set_latent_statistics(torch.randn(64, *model.latent_shape))
    images = torch.randint(0, 256, (1024, 1, 32, 32), dtype=torch.uint8)
    latents, captions = torch.randn(1024, *model.latent_shape), [PROMPT] * 1024

    first = stage_step(
        model.autoencoder, first_stage_loss_fn(images, recipe.first.batch_size, recipe.kl_weight), recipe.first.lr
    )
    second_loss = second_stage_loss_fn(model, latents, captions, recipe.second.batch_size)
    second = stage_step(model.second_stage, second_loss, recipe.second.lr)
    first_seconds, second_seconds = median_seconds(first), median_seconds(second)
    peak = convolution_throughput()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it cannot see into a fused kernel
        second_loss(model.second_stage, torch.Generator().manual_seed(0)).backward()
    reached = counter.get_total_flops() / second_seconds / 1e9
    model.requires_grad_(False).eval()
    sampling = median_seconds(lambda: model.sample([PROMPT] * 16), repeats=3)
    return {
        f"first stage, steps/s (batch {recipe.first.batch_size})": 1 / first_seconds,
        f"second stage, steps/s (batch {recipe.second.batch_size})": 1 / second_seconds,
        "sampling, images/s (16 at once, 20 DDIM steps, w = 2)": 16 / sampling,
        "peak memory, MB": peak_megabytes(),
        "3x3 convolution, GFLOP/s": peak,
        "second stage, GFLOP/s": reached,
        "second stage, share of the convolution's": reached / peak,
    }
