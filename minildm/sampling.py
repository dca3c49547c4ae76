# Exported from notebooks/06_ddim.ipynb by tools/export.py: edit the notebook, not this file.
"""From noise to data in few steps: DDIM, its inverse, DPM-Solver++(2M), and the loop around them."""

import math
from collections.abc import Callable, Iterator

import torch

from minildm.diffusion import Schedule, ddpm_sample

SAMPLERS = ("ddim", "ddpm", "dpm++")


def ddim_step(
    schedule: Schedule, x0: torch.Tensor, eps: torch.Tensor, t: int, t_next: int, noise: torch.Tensor, eta: float = 0.0
) -> torch.Tensor:
    """One jump from step t to t_next of either direction, given the estimates x0 and ε at t (B, …) (DDIM eq. 12).

    √ᾱ' x0 + √(1-ᾱ'-σ²) ε + σ noise with σ = η √((1-ᾱ')/(1-ᾱ)) √(1-ᾱ/ᾱ'): η = 0 is deterministic, η = 1 is DDPM.
    """
    a, a_next = schedule.at(t, x0), schedule.at(t_next, x0)
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).clamp(min=0).sqrt()
    return a_next.sqrt() * x0 + (1 - a_next - sigma**2).clamp(min=0).sqrt() * eps + sigma * noise


def ddim_sample(
    denoise: Callable,
    schedule: Schedule,
    x: torch.Tensor,
    steps: list[int],
    generator: torch.Generator,
    eta: float = 0.0,
) -> Iterator[torch.Tensor]:
    """DDIM from x (B, …) at the first of the falling `steps`; yields x after every step, the last one clean.

    `denoise(x, t)` gives the estimates (x0, eps).
    """
    for t, t_next in zip(steps, [*steps[1:], -1], strict=True):
        x0, eps = denoise(x, t)
        noise = torch.randn(x.shape, generator=generator).to(x) if eta > 0 else torch.zeros_like(x)
        x = ddim_step(schedule, x0, eps, t, t_next, noise, eta)
        yield x


def timesteps(schedule: Schedule, steps: int, spacing: str = "trailing") -> list[int]:
    """`steps` falling time steps of the schedule's T (Lin et al., 2023, table 2).

    "trailing" counts down from T-1 in equal strides, so the first step sees the noise level that sampling starts from;
    "leading" counts up from 0 and never reaches T-1; "linspace" takes both ends.
    Raises ValueError when steps is not between 1 and T or the spacing is unknown.
    """
    total = len(schedule)
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total}, not {steps}.")
    if spacing == "leading":
        return [i * (total // steps) for i in reversed(range(steps))]
    if spacing == "linspace":
        return torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().flip(0).tolist()
    if spacing == "trailing":
        return [round(total - i * total / steps) - 1 for i in range(steps)]
    raise ValueError(f'there is no spacing "{spacing}": choose one of trailing, leading, linspace.')


def dpm_solver_sample(
    denoise: Callable, schedule: Schedule, x: torch.Tensor, steps: list[int]
) -> Iterator[torch.Tensor]:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2): like DDIM, but x0 is extrapolated from its last two estimates.

    In λ = log √(ᾱ/(1-ᾱ)) the exact step for a constant x0 is DDIM; a linear x0 makes it second order. The first step
    has no past, and the last one ends at λ = ∞, where only the newest estimate counts: both are of first order.
    """
    x0_before, h_before = None, None
    for t, t_next in zip(steps, [*steps[1:], -1], strict=True):
        x0, _ = denoise(x, t)
        if t_next < 0:
            yield x0
            return
        a, a_next = schedule.at(t, x), schedule.at(t_next, x)
        h = 0.5 * (torch.log(a_next / (1 - a_next)) - torch.log(a / (1 - a)))
        direction = x0
        if x0_before is not None:
            direction = x0 + h / (2 * h_before) * (x0 - x0_before)
        x = ((1 - a_next) / (1 - a)).sqrt() * x - a_next.sqrt() * torch.expm1(-h) * direction
        x0_before, h_before = x0, h
        yield x


def ddim_invert(denoise: Callable, schedule: Schedule, x: torch.Tensor, steps: list[int]) -> Iterator[torch.Tensor]:
    """DDIM backwards in time: from clean x (B, …) to the noise that DDIM with the same falling `steps` turns into x.

    The estimate of ε at the start of a jump stands in for the one at its end, so the way back is exact only in the
    limit of many steps. Yields x after every step.
    """
    rising = steps[::-1]
    for t, t_next in zip([-1, *rising[:-1]], rising, strict=True):
        _, eps = denoise(x, max(t, 0))
        a = schedule.at(t, x)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = ddim_step(schedule, x0, eps, t, t_next, torch.zeros_like(x))
        yield x


def slerp(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """Between two noises (B, …) on the arc of their sphere, share in [0, 1]: a straight line would lose variance."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = torch.acos(cosine.clamp(-1, 1)).view(-1, *[1] * (a.ndim - 1))
    arc = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return torch.where(angle < math.radians(0.1), (1 - share) * a + share * b, arc)  # parallel: 0 / 0


def sample(
    denoise: Callable,
    schedule: Schedule,
    x: torch.Tensor,
    steps: list[int],
    generator: torch.Generator,
    sampler: str = "ddim",
    eta: float = 0.0,
) -> Iterator[torch.Tensor]:
    """One of SAMPLERS from x (B, …) at the first of the falling `steps`; yields x after every step.

    Raises ValueError for an unknown sampler or an eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 (DDIM) and 1 (DDPM), not {eta}.")
    if sampler == "ddim":
        return ddim_sample(denoise, schedule, x, steps, generator, eta)
    if sampler == "ddpm":
        return ddpm_sample(denoise, schedule, x, steps, generator)
    if sampler == "dpm++":
        return dpm_solver_sample(denoise, schedule, x, steps)
    raise ValueError(f'there is no sampler "{sampler}": choose one of {", ".join(SAMPLERS)}.')


def denoiser(model: Callable, schedule: Schedule, target: str) -> Callable:
    """Turns model(x, t) with t (B,) into the denoise(x, t) that samplers call: t one number, result (x0, eps)."""

    def denoise(x: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        prediction = model(x, torch.full((len(x),), t, device=x.device))
        return schedule.x0_and_eps(target, prediction, x, t)

    return denoise
