"""Schedules, noising and whole trajectories of every sampler against diffusers, both sides in float64.

diffusers computes its tables, and each step of its DPM-Solver, in float32. The fixture `double` lets the same code
compute in float64, so that agreement to 1e-8 over a whole path can be asked for; what it really does in float32 is
compared with a tolerance that says how far float32 carries.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddim_inverse,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from reference import BETAS, SCHEDULES, dummy_model, noise_like_image, scheduler

from minildm.data import seeded
from minildm.diffusion import TARGETS, ddpm_sample, make_schedule
from minildm.sampling import ddim_invert, ddim_sample, denoiser, dpm_solver_sample, timesteps
from minildm.unet import UNet, UNetConfig

pytestmark = pytest.mark.parity
SPACINGS = ("leading", "trailing", "linspace")
each_schedule = pytest.mark.parametrize("kind", BETAS)
each_target = pytest.mark.parametrize("target", TARGETS)
# A thousand steps are the same list for every spacing (tested below), so they are walked once.
each_walk = pytest.mark.parametrize(
    "steps, spacing", [(n, spacing) for n in (1, 2, 3, 10, 50) for spacing in SPACINGS] + [(1000, "leading")]
)


class DoublePrecision:
    """A module, torch or numpy, whose float32 is float64: where diffusers asks for the one, it gets the other."""

    def __init__(self, module):
        self.module, self.float32 = module, module.float64

    def __getattr__(self, name: str):
        return getattr(self.module, name)


@pytest.fixture
def double(monkeypatch):
    """diffusers' schedulers compute their tables and their steps in float64."""
    for module in (scheduling_ddim, scheduling_ddim_inverse, scheduling_ddpm, scheduling_dpmsolver_multistep):
        monkeypatch.setattr(module, "torch", DoublePrecision(torch))
        monkeypatch.setattr(module, "np", DoublePrecision(np))


def assert_same_path(ours, theirs):
    """Every state of two samplers, in float64, to 1e-8."""
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.fixture(scope="module")
def unet():
    """A real, small network in float64 for x (2, 3, 4, 4); none of its branches is silent."""
    torch.manual_seed(0)
    model = UNet(UNetConfig(3, 3, 8, (1, 2), 1, (False, True), 2, groups=4)).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(0)).double())
    return model


# schedules and noising


@each_schedule
def test_betas_and_alpha_bar_in_float64(kind, double):
    theirs, ours = scheduler(DDPMScheduler, kind), SCHEDULES[kind]
    assert theirs.betas.dtype == torch.float64
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod, rtol=1e-10, atol=0)


@each_schedule
def test_betas_and_alpha_bar_in_float32(kind):
    theirs, ours = scheduler(DDPMScheduler, kind), SCHEDULES[kind]
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=0, atol=1e-7)
    # a product of up to a thousand factors, each rounded by 6e-8 at most
    assert (ours.alpha_bar - theirs.alphas_cumprod).abs().max() < 1e-5
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=6e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_zero_terminal_snr(kind):
    plain, zero = make_schedule(kind), make_schedule(kind, zero_terminal_snr=True)
    torch.testing.assert_close(zero.betas, rescale_zero_terminal_snr(plain.betas), rtol=1e-9, atol=1e-12)
    assert zero.alpha_bar[0] == pytest.approx(plain.alpha_bar[0].item(), abs=1e-15)


@each_schedule
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_noised_images_and_velocities(kind, dtype, atol, double):
    theirs, schedule = scheduler(DDPMScheduler, kind), SCHEDULES[kind]
    x0, eps = (torch.randn(1000, 2, 3, 3, generator=seeded(i), dtype=dtype) for i in (0, 1))
    t = torch.arange(1000)
    torch.testing.assert_close(schedule.add_noise(x0, t, eps), theirs.add_noise(x0, eps, t), rtol=0, atol=atol)
    torch.testing.assert_close(schedule.target("v", x0, t, eps), theirs.get_velocity(x0, eps, t), rtol=0, atol=atol)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 20, 30, 50, 333, 600, 999, 1000])
def test_time_steps(spacing, steps):
    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert timesteps(SCHEDULES["linear"], steps, spacing) == theirs.timesteps.tolist()
    assert steps < 1000 or theirs.timesteps.tolist() == list(range(999, -1, -1))


# samplers: for each, diffusers' side is a generator of its states


def diffusers_ddim(made, model, x, eta: float = 0.0, generator: torch.Generator | None = None):
    """DDIM. diffusers jumps by ⌊T/N⌋ even where its own next step is elsewhere; there it is told the real jump."""
    order, native = made.timesteps.tolist(), made.num_inference_steps
    for t, t_next in zip(order, [*order[1:], -1], strict=True):
        differs = t_next != max(t - 1000 // native, -1)
        made.num_inference_steps = Fraction(1000, t - t_next) if differs else native
        noise = torch.randn(x.shape, generator=generator).double() if eta else None
        x = made.step(model(x, torch.full((len(x),), t)), t, x, eta=eta, variance_noise=noise).prev_sample
        yield x


def diffusers_dpm(made, model, x):
    """DPM-Solver++(2M)."""
    for t in made.timesteps:
        x = made.step(model(x, t.expand(len(x))), t, x).prev_sample
        yield x


def diffusers_ddpm(made, model, x, generator: torch.Generator, monkeypatch):
    """DDPM. The noise of the jump to clean data is zero here, where diffusers would add some unless t is 0."""
    last = made.timesteps[-1]
    for t in made.timesteps:
        noise = torch.randn(x.shape, generator=generator).double() * (t != last)
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, noise=noise, **__: noise)
        x = made.step(model(x, t.expand(len(x))), t, x).prev_sample
        yield x


def walk(kind: type, schedule: str, target: str, steps: int, spacing: str, **config):
    """Our steps, and a scheduler of diffusers that is set to the same ones by its own rule."""
    order = timesteps(SCHEDULES[schedule], steps, spacing)
    made = scheduler(kind, schedule, target, timestep_spacing=spacing, **config)
    made.set_timesteps(steps)
    assert made.timesteps.tolist() == order
    return order, made


def compare_ddim(model, kind, target, steps, spacing, etas=(0.0, 0.3, 1.0)):
    """DDIM with the same noise, for each η."""
    schedule, x = SCHEDULES[kind], noise_like_image()
    for eta in etas:
        order, made = walk(DDIMScheduler, kind, target, steps, spacing)
        ours = ddim_sample(denoiser(model, schedule, target), schedule, x, order, seeded(3), eta)
        assert_same_path(ours, diffusers_ddim(made, model, x, eta, seeded(3)))


def compare_ddpm(model, kind, target, steps, spacing, monkeypatch):
    """Ancestral sampling with the same noise, for both variances."""
    schedule, x = SCHEDULES[kind], noise_like_image()
    for large in (False, True):
        variance = "fixed_large" if large else "fixed_small"
        order, made = walk(DDPMScheduler, kind, target, steps, spacing, variance_type=variance)
        ours = ddpm_sample(denoiser(model, schedule, target), schedule, x, order, seeded(3), large)
        assert_same_path(ours, diffusers_ddpm(made, model, x, seeded(3), monkeypatch))


def compare_dpm(model, kind, target, steps, spacing):
    """DPM-Solver++(2M) ending at clean data; diffusers' own spacings leave out one end, so it is given our steps."""
    schedule, x = SCHEDULES[kind], noise_like_image()
    order = timesteps(schedule, steps, spacing)
    made = scheduler(DPMSolverMultistepScheduler, kind, target, final_sigmas_type="zero")
    made.set_timesteps(timesteps=order)
    assert made.sigmas.dtype == torch.float64
    ours = dpm_solver_sample(denoiser(model, schedule, target), schedule, x, order)
    assert_same_path(ours, diffusers_dpm(made, model, x))


@each_schedule
@each_target
@each_walk
def test_ddim(kind, target, steps, spacing, double):
    compare_ddim(dummy_model(), kind, target, steps, spacing)


@each_schedule
@each_target
@each_walk
def test_ddpm(kind, target, steps, spacing, double, monkeypatch):
    compare_ddpm(dummy_model(), kind, target, steps, spacing, monkeypatch)


@each_schedule
@each_target
@each_walk
def test_dpm_solver(kind, target, steps, spacing, double):
    compare_dpm(dummy_model(), kind, target, steps, spacing)


@each_schedule
@each_target
@pytest.mark.parametrize("steps, spacing", [(1, "trailing"), (2, "leading"), (3, "trailing"), (10, "linspace")])
def test_every_sampler_with_a_real_unet(kind, target, steps, spacing, unet, double, monkeypatch):
    compare_ddim(unet, kind, target, steps, spacing)
    compare_ddpm(unet, kind, target, steps, spacing, monkeypatch)
    compare_dpm(unet, kind, target, steps, spacing)


@each_schedule
@each_target
@pytest.mark.parametrize("spacing, steps", [(s, n) for s in ("leading", "trailing") for n in (1, 2, 3, 10, 50)])
def test_ddim_inverse(kind, target, steps, spacing, unet, double):
    compare_inverse(dummy_model(), kind, target, steps, spacing)
    if steps <= 10:
        compare_inverse(unet, kind, target, steps, spacing)


@each_schedule
@each_target
def test_ddim_inverse_with_a_thousand_steps(kind, target, double):
    compare_inverse(dummy_model(), kind, target, 1000, "leading")


def compare_inverse(model, kind, target, steps, spacing):
    """DDIM backwards, from clean data to noise. diffusers is handed the prediction made at the start of each jump."""
    schedule, x = SCHEDULES[kind], noise_like_image()
    order = timesteps(schedule, steps, spacing)
    ours = list(ddim_invert(denoiser(model, schedule, target), schedule, x, order))
    made = scheduler(DDIMInverseScheduler, kind, target, timestep_spacing=spacing)
    made.set_timesteps(steps)
    rising = made.timesteps.tolist()
    assert rising == order[::-1]
    theirs = []
    for t, t_next in zip([-1, *rising[:-1]], rising, strict=True):
        if t < 0 and target != "eps":  # ε cannot be read from x0 or v of clean data: the rest of the path is compared
            theirs.append(x := ours[0])
            continue
        made.num_inference_steps = Fraction(1000, t_next - t)  # the real jump, as above
        x = made.step(model(x, torch.full((len(x),), max(t, 0))), t_next, x).prev_sample
        theirs.append(x)
    assert_same_path(ours, theirs)


# as diffusers really computes, in float32


@each_schedule
@each_target
def test_paths_in_float32(kind, target):
    schedule, model, x = SCHEDULES[kind], dummy_model(), noise_like_image().float()
    model = lambda x, t, model=model: model(x.double(), t).float()  # noqa: E731
    denoise = denoiser(model, schedule, target)
    largest = float(schedule.snr()[-1] ** -0.5) if target == "eps" else 1.0  # ε → x0 magnifies rounding by b/a
    for steps in (3, 20):
        order, made = walk(DDIMScheduler, kind, target, steps, "trailing")
        ours = [*ddim_sample(denoise, schedule, x, order, seeded(0))][-1]
        theirs = [*diffusers_ddim(made, model, x)][-1]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)
        made = scheduler(DPMSolverMultistepScheduler, kind, target, final_sigmas_type="zero")
        made.set_timesteps(timesteps=order)
        ours = [*dpm_solver_sample(denoise, schedule, x, order)][-1]
        torch.testing.assert_close(ours, [*diffusers_dpm(made, model, x)][-1], rtol=1e-4, atol=1e-5 * largest)
