"""The independent side of the comparisons: diffusers' schedulers in float64, and cases with a known answer."""

import math
from collections.abc import Iterator

import torch
from diffusers import DPMSolverMultistepScheduler

from minildm.data import seeded
from minildm.diffusion import Schedule, make_schedule
from minildm.toy import GaussianMixture

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}  # theirs by our names


def dummy_model(seed: int = 0, channels: int = 3):
    """A smooth function of x (B, channels, H, W) and t (B,) in float64 that stands for a network."""
    weight = torch.randn(channels, channels, generator=seeded(seed)).double()

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = (t.double() / 1000).view(-1, 1, 1, 1)
        return torch.tanh(torch.einsum("oc,bchw->bohw", weight, x) + time)

    return model


def noise_like_image(seed: int = 0) -> torch.Tensor:
    """x_T (2, 3, 4, 4) in float64."""
    return torch.randn(2, 3, 4, 4, generator=seeded(seed)).double()


def scheduler(kind: type, schedule: str, target: str = "eps", **config):
    """A scheduler of diffusers, by our names of schedule and target, that does not clip."""
    if kind is not DPMSolverMultistepScheduler:
        config["clip_sample"] = False
    return kind(beta_schedule=BETAS[schedule], prediction_type=PREDICTION_TYPES[target], **config)


def last(states: Iterator[torch.Tensor]) -> torch.Tensor:
    """The final state of a sampler."""
    return list(states)[-1]


def ideal_denoise(data: GaussianMixture, schedule: Schedule):
    """The closed-form denoise(x, t) → (x0, eps) for data from a mixture."""

    def denoise(x: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_bar = schedule.alpha_bar[t].item()
        x0 = data.denoise(x, alpha_bar)
        return x0, (x - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)

    return denoise


def gaussian_flow(mean: float, std: float, schedule: Schedule, x: torch.Tensor) -> torch.Tensor:
    """Where the exact deterministic flow takes x at the last step, for data from N(mean, std²): the same quantile."""
    a = schedule.alpha_bar[-1]
    return mean + std * (x - a.sqrt() * mean) / (a * std**2 + 1 - a).sqrt()


SCHEDULES = {kind: make_schedule(kind) for kind in BETAS}
