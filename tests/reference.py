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


def scheduler(kind: type, schedule: Schedule, target: str, order: list[int], **config):
    """A scheduler of diffusers with the schedule's own float64 table, about to walk the time steps `order`."""
    made = kind(num_train_timesteps=len(schedule), prediction_type=PREDICTION_TYPES[target], **config)
    made.set_timesteps(len(order))
    made.timesteps = torch.tensor(order)
    made.alphas_cumprod = schedule.alpha_bar
    made.betas, made.alphas = schedule.betas, 1 - schedule.betas
    made.one = made.final_alpha_cumprod = made.initial_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    if kind is DPMSolverMultistepScheduler:
        sigmas = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt()[order]
        made.sigmas = torch.cat([sigmas, torch.zeros(1).double()])
    return made


def trajectory(made, model, x: torch.Tensor, **options) -> list[torch.Tensor]:
    """What a scheduler of diffusers makes of x, after every step."""
    states = []
    for t in made.timesteps:
        x = made.step(model(x, t.expand(len(x))), t, x, **options).prev_sample
        states.append(x)
    return states


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
