# Exported from notebooks/02_forward_process.ipynb by tools/export.py: edit the notebook, not this file.
"""The forward process in closed form, its posterior, the three targets, the loss, and ancestral sampling."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

TARGETS = ("eps", "x0", "v")


@dataclass(frozen=True)
class Schedule:
    """How much signal is left after each noising step: `alpha_bar` (T,), float64, falling, in [0, 1).

    Step t of 0 … T-1 gives x_t = √ᾱ_t x0 + √(1-ᾱ_t) ε (DDPM eq. 4); t = -1 stands for clean data, ᾱ = 1.
    """

    alpha_bar: torch.Tensor

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @property
    def betas(self) -> torch.Tensor:
        """β_t = 1 - ᾱ_t / ᾱ_{t-1}, the variance that step t adds, (T,)."""
        return 1 - self.alpha_bar / torch.cat([torch.ones(1).double(), self.alpha_bar[:-1]])

    def at(self, t: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor:
        """ᾱ_t in the type of `like` (B, …), shaped (B, 1, …) to multiply it; t is one step or (B,), -1 … T-1."""
        t = torch.as_tensor(t).cpu().expand(len(like))
        value = torch.where(t < 0, 1.0, self.alpha_bar[t.clamp(min=0)])
        return value.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))

    def snr(self) -> torch.Tensor:
        """ᾱ / (1-ᾱ), signal power over noise power, (T,)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def add_noise(self, x0: torch.Tensor, t: torch.Tensor | int, eps: torch.Tensor) -> torch.Tensor:
        """A draw from q(x_t | x0) for x0 and eps (B, …): √ᾱ_t x0 + √(1-ᾱ_t) ε (DDPM eq. 4)."""
        a = self.at(t, x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    def target(self, kind: str, x0: torch.Tensor, t: torch.Tensor | int, eps: torch.Tensor) -> torch.Tensor:
        """What the network learns to predict: "eps", "x0", or "v" = √ᾱ ε - √(1-ᾱ) x0 (Salimans & Ho, 2022)."""
        a = self.at(t, x0)
        _check_target(kind)
        return {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[kind]

    def x0_and_eps(
        self, kind: str, prediction: torch.Tensor, xt: torch.Tensor, t: torch.Tensor | int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimates of x0 and ε that a prediction of kind "eps", "x0" or "v" means at xt (B, …)."""
        _check_target(kind)
        a = self.at(t, xt)
        signal, noise = a.sqrt(), (1 - a).sqrt()
        if kind == "eps":
            return (xt - noise * prediction) / signal, prediction
        if kind == "x0":
            return prediction, (xt - signal * prediction) / noise
        return signal * xt - noise * prediction, noise * xt + signal * prediction

    def posterior(self, x0: torch.Tensor, xt: torch.Tensor, t: int, t_prev: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, …) and variance (B, 1, …) of q(x_{t_prev} | x_t, x0), t_prev < t (DDPM eq. 7 for t_prev = t-1)."""
        a, a_prev = self.at(t, xt), self.at(t_prev, xt)
        alpha = a / a_prev  # of the whole jump from t_prev to t
        mean = (a_prev.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - a_prev) * xt) / (1 - a)
        return mean, (1 - alpha) * (1 - a_prev) / (1 - a)


def _check_target(kind: str) -> None:
    if kind not in TARGETS:
        raise ValueError(f'there is no target "{kind}": choose one of {", ".join(TARGETS)}.')


def make_schedule(
    kind: str = "linear",
    steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """A schedule of `steps` steps.

    "linear": β on a line from beta_start to beta_end (DDPM). "scaled_linear": √β on a line (Stable Diffusion; CompVis
    calls this one "linear"). "cosine": ᾱ follows a squared cosine, β at most 0.999 (Nichol & Dhariwal, eq. 17).
    `zero_terminal_snr` shifts and stretches √ᾱ so that nothing of x0 is left at the last step (Lin et al., 2023).
    Raises ValueError for an unknown kind.
    """
    if kind == "linear":
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "cosine":
        time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        curve = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f'there is no schedule "{kind}": choose linear, scaled_linear or cosine.')
    root = torch.cumprod(1 - betas, 0).sqrt()
    if zero_terminal_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return Schedule(root**2)


def diffusion_loss(
    model: Callable,
    schedule: Schedule,
    x0: torch.Tensor,
    generator: torch.Generator,
    target: str = "eps",
    logit_normal: tuple[float, float] | None = None,
    **conditioning,
) -> torch.Tensor:
    """Mean squared error of the prediction at a random step for each of x0 (B, …), a scalar (DDPM eq. 14, LDM eq. 2).

    `model(xt, t, **conditioning)` predicts the target; steps and noise are drawn from the (CPU) generator, for x0[i]
    the step ⌊T (i + u) / B⌋ with u in [0, 1): one from each of B equal parts of the schedule, which makes the loss less
    noisy (after Kingma et al., 2021, appendix I.1). So x0 must be in random order.
    `logit_normal` = (m, s) crowds the steps around the part sigmoid(m) of the schedule: the place p of [0, 1] goes to
    sigmoid(m + s Φ⁻¹(p)), whose logit is normal with mean m and deviation s (Esser et al., 2024, section 3.1).
    """
    places = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)  # one in each part of [0, 1]
    if logit_normal is not None:
        places = torch.sigmoid(logit_normal[0] + logit_normal[1] * torch.special.ndtri(places))
    t = (places * len(schedule)).long().clamp(max=len(schedule) - 1)
    eps = torch.randn(x0.shape, generator=generator).to(x0)
    prediction = model(schedule.add_noise(x0, t, eps), t.to(x0.device), **conditioning)
    return F.mse_loss(prediction, schedule.target(target, x0, t, eps))


def ddpm_sample(
    denoise: Callable,
    schedule: Schedule,
    x: torch.Tensor,
    timesteps: list[int],
    generator: torch.Generator,
    large_variance: bool = False,
) -> Iterator[torch.Tensor]:
    """Ancestral sampling (DDPM algorithm 2), starting from noise x (B, …) and yielding x after every step.

    `denoise(x, t)` gives the estimates (x0, eps); `timesteps` fall, for example range(999, -1, -1), and each step draws
    from the posterior of the jump to the next one. The last result is clean. `large_variance` takes 1-α of the jump in
    place of the posterior's variance, except in the last jump (the two choices of DDPM section 3.2).
    """
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        x0, _ = denoise(x, t)
        mean, variance = schedule.posterior(x0, x, t, t_prev)
        if large_variance and t_prev >= 0:
            variance = 1 - schedule.at(t, x) / schedule.at(t_prev, x)
        noise = torch.randn(x.shape, generator=generator).to(x)
        x = mean + variance.sqrt() * noise
        yield x
