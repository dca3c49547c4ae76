"""Lesson 06: whole trajectories against diffusers, and where the samplers must land when the denoiser is ideal."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    BETAS,
    SCHEDULES,
    dummy_model,
    gaussian_flow,
    ideal_denoise,
    last,
    noise_like_image,
)

from minildm.data import seeded
from minildm.diffusion import TARGETS, ddpm_sample, make_schedule
from minildm.sampling import (
    SAMPLERS,
    ddim_invert,
    ddim_sample,
    ddim_step,
    denoiser,
    dpm_solver_sample,
    sample,
    slerp,
    timesteps,
)
from minildm.toy import GaussianMixture, ring

SPACINGS = ("trailing", "leading", "linspace")
GAUSSIAN = GaussianMixture(torch.tensor([[0.5]]).double(), 0.3)


def assert_same_path(ours, theirs, rtol=1e-8, atol=1e-8):
    ours = list(ours)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# time steps


@given(total=st.integers(1, 300), share=st.floats(0, 1), spacing=st.sampled_from(SPACINGS))
def test_time_steps_fall_from_the_noise_sampling_starts_at(total, share, spacing):
    steps = max(1, round(share * total))
    order = timesteps(make_schedule(steps=total), steps, spacing)
    assert len(order) == steps and all(type(t) is int for t in order)
    assert all(a > b for a, b in zip(order, order[1:], strict=False))
    assert order[-1] >= 0 and order[0] < total
    if spacing == "trailing" or (spacing == "linspace" and steps > 1):
        assert order[0] == total - 1
    if spacing == "leading" or (spacing == "linspace" and steps > 1):
        assert order[-1] == 0


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_impossible_numbers_of_steps_are_refused(steps, spacing):
    with pytest.raises(ValueError, match=f"steps must be between 1 and 1000, not {steps}"):
        timesteps(SCHEDULES["linear"], steps, spacing)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match='no spacing "tailing": choose one of trailing, leading, linspace'):
        timesteps(SCHEDULES["linear"], 10, "tailing")


# laws


@given(kind=st.sampled_from(list(BETAS)), target=st.sampled_from(TARGETS), seed=st.integers(0, 99))
def test_ddim_with_eta_1_is_ancestral_sampling(kind, target, seed):
    schedule, x = SCHEDULES[kind], noise_like_image(seed)
    order, denoise = timesteps(schedule, 12), denoiser(dummy_model(seed), schedule, target)
    ancestral = list(ddpm_sample(denoise, schedule, x, order, seeded(seed)))
    assert_same_path(ddim_sample(denoise, schedule, x, order, seeded(seed), eta=1.0), ancestral, 1e-6, 1e-6)


@given(t=st.integers(1, 999), back=st.floats(0, 1), eta=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_ddim_jump_keeps_the_marginal_for_any_eta(t, back, eta, seed):
    schedule, t_next = SCHEDULES["linear"], int(back * (t - 1))
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    signal, eps_share, noise_share = (
        ddim_step(schedule, *parts, t, t_next, noise, eta).item()
        for parts, noise in (((one, zero), zero), ((zero, one), zero), ((zero, zero), one))
    )
    a = schedule.alpha_bar[t_next].item()
    assert signal == pytest.approx(math.sqrt(a))
    assert eps_share**2 + noise_share**2 == pytest.approx(1 - a)
    assert (noise_share > 0) == (eta > 0)


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0), ("dpm++", 0.0)])
@pytest.mark.parametrize("kind, steps", [("cosine", 20), ("cosine", 60), ("linear", 100)])
def test_the_ideal_denoiser_lands_on_the_mixture_s_moments(sampler, eta, kind, steps):
    data, schedule = ring(), SCHEDULES[kind]
    x = torch.randn(4000, 2, generator=seeded(0))
    x = last(sample(ideal_denoise(data, schedule), schedule, x, timesteps(schedule, steps), seeded(1), sampler, eta))
    distance, nearest = torch.cdist(x, data.means).min(1)
    assert (nearest.bincount(minlength=8) / 500 - 1).abs().max() < 0.15
    torch.testing.assert_close(x.mean(0), torch.zeros(2), rtol=0, atol=0.06)
    second = 1.5**2 / 2 + data.std**2  # of each coordinate
    torch.testing.assert_close(torch.cov(x.T), second * torch.eye(2), rtol=0.05, atol=0.05)
    spread = (distance**2).mean().sqrt().item() / math.sqrt(2)
    assert 0.6 * data.std < spread < 1.1 * data.std  # few steps make the modes too narrow


def flow_errors(sampler: str, kind: str, counts: list[int]) -> list[float]:
    """Distance of a sampler's result from the exact flow of Gaussian data, for each number of steps."""
    schedule, x = SCHEDULES[kind], torch.linspace(-2, 2, 41).double()[:, None]
    exact, denoise = gaussian_flow(0.5, 0.3, schedule, x), ideal_denoise(GAUSSIAN, schedule)
    results = (last(sample(denoise, schedule, x, timesteps(schedule, n), seeded(0), sampler)) for n in counts)
    return [(result - exact).abs().max().item() for result in results]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ddim_is_of_first_order_and_dpm_solver_much_better(kind):
    ddim = flow_errors("ddim", kind, [40, 80, 160, 320])
    assert all(0.45 < b / a < 0.58 for a, b in zip(ddim, ddim[1:], strict=False))  # twice the steps, half the error
    assert ddim[-1] < 0.01
    for ours, theirs in zip(flow_errors("dpm++", kind, [40, 80, 160]), ddim, strict=False):
        assert ours < theirs / 3
    assert flow_errors("dpm++", kind, [160])[0] < 1e-3


def test_a_dpm_solver_step_errs_only_in_third_order_when_x0_is_a_line_in_lambda():
    schedule = SCHEDULES["cosine"]
    order, lam = timesteps(schedule, 12), 0.5 * torch.log(schedule.snr())

    def denoise(x, t):
        return torch.full_like(x, 2 + 0.3 * lam[t].item()), None

    states = list(dpm_solver_sample(denoise, schedule, torch.zeros(1, 1).double(), order))
    for before, after, t, t_next in zip(states[:-2], states[1:-1], order[1:], order[2:], strict=False):
        # x' = σ'/σ x + σ' ∫ exp(λ) x0(λ) dλ (DPM-Solver++, proposition 4.1)
        grid = np.linspace(lam[t].item(), lam[t_next].item(), 20001)
        sigma, sigma_next = ((1 - schedule.alpha_bar[i]).sqrt().item() for i in (t, t_next))
        exact = sigma_next * (before.item() / sigma + np.trapezoid(np.exp(grid) * (2 + 0.3 * grid), grid))
        h = (lam[t_next] - lam[t]).item()
        assert abs(after.item() - exact) < 0.3 * h**3 / 12  # first order: up to 0.3 h² / 2


def test_inverted_data_is_standard_noise():
    data, schedule = ring(), SCHEDULES["cosine"]
    noise = last(
        ddim_invert(ideal_denoise(data, schedule), schedule, data.sample(4000, seeded(0)), list(range(999, 0, -5)))
    )
    torch.testing.assert_close(noise.mean(0), torch.zeros(2), rtol=0, atol=0.06)
    torch.testing.assert_close(torch.cov(noise.T), torch.eye(2), rtol=0.07, atol=0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr_is_no_obstacle_to_v(sampler):
    schedule = make_schedule("scaled_linear", zero_terminal_snr=True)
    denoise = denoiser(lambda x, t: torch.tanh(x), schedule, "v")
    x = last(sample(denoise, schedule, noise_like_image(), timesteps(schedule, 10), seeded(0), sampler))
    assert torch.isfinite(x).all()


# the door


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_chooses_the_sampler_and_yields_every_step(sampler):
    schedule, x = SCHEDULES["linear"], noise_like_image()
    denoise, order = denoiser(dummy_model(), schedule, "v"), timesteps(schedule, 6)
    direct = {
        "ddim": lambda: ddim_sample(denoise, schedule, x, order, seeded(1), 0.5),
        "ddpm": lambda: ddpm_sample(denoise, schedule, x, order, seeded(1)),
        "dpm++": lambda: dpm_solver_sample(denoise, schedule, x, order),
    }[sampler]
    ours = list(sample(denoise, schedule, x, order, seeded(1), sampler, eta=0.5))
    assert len(ours) == 6
    assert all(torch.equal(a, b) for a, b in zip(ours, direct(), strict=True))


@pytest.mark.parametrize(
    "options, says",
    [({"sampler": "euler"}, 'no sampler "euler": choose one of ddim, ddpm, dpm\\+\\+')]
    + [({"eta": eta}, "eta must be between 0 .* and 1") for eta in (-0.1, 1.1, math.nan, math.inf)],
)
def test_bad_options_are_refused_before_any_work(options, says):
    def never(x, t):
        raise AssertionError

    with pytest.raises(ValueError, match=says):
        sample(never, SCHEDULES["linear"], noise_like_image(), [999], seeded(0), **options)


# slerp


@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_slerp_keeps_the_norm_and_divides_the_angle(share, seed):
    a, b = (torch.nn.functional.normalize(torch.randn(3, 20, generator=seeded(s)).double()) for s in (seed, seed + 1))
    between = slerp(a, b, share)
    torch.testing.assert_close(between.norm(dim=1), torch.ones(3).double())
    angle = torch.acos((a * b).sum(1))
    torch.testing.assert_close(torch.acos((a * between).sum(1).clamp(-1, 1)), share * angle, rtol=1e-5, atol=1e-6)


def test_slerp_ends_where_it_should_also_for_equal_noises():
    a = torch.randn(3, 1, 4, 4, generator=seeded(0))
    b = torch.cat([a[:1], torch.randn(2, 1, 4, 4, generator=seeded(1))])  # the first pair is equal
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    assert torch.isfinite(slerp(a, b, 0.3)).all()
    torch.testing.assert_close(slerp(a, b, 0.3)[0], a[0])
