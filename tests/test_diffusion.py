"""Lesson 02: schedules, the forward process, its posterior, the targets, the loss and ancestral sampling."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given
from hypothesis import strategies as st
from reference import BETAS, SCHEDULES, ideal_denoise, last

from minildm.data import seeded
from minildm.diffusion import TARGETS, Schedule, ddpm_sample, diffusion_loss, make_schedule
from minildm.toy import GaussianMixture

any_schedule = st.sampled_from(list(SCHEDULES.values()))
any_step = st.integers(0, 999)
any_target = st.sampled_from(TARGETS)
number = st.floats(-5, 5)


def scalar(value: float) -> torch.Tensor:
    """A batch of one number in float64."""
    return torch.tensor([[value]], dtype=torch.float64)


# schedules


def test_linear_is_linear_in_beta_and_scaled_linear_in_its_root():
    assert np.allclose(make_schedule("linear", 7, 0.01, 0.07).betas, [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07])
    roots = make_schedule("scaled_linear", 4, 0.01, 0.16).betas.sqrt()
    assert np.allclose(roots, [0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("zero", [False, True])
def test_signal_falls_from_almost_everything(kind, zero):
    schedule = make_schedule(kind, zero_terminal_snr=zero)
    assert schedule.alpha_bar.dtype == torch.float64 and len(schedule) == 1000
    assert 0.999 < schedule.alpha_bar[0] < 1 and (schedule.alpha_bar.diff() < 0).all()
    assert (schedule.alpha_bar[-1] == 0) == zero


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_zero_terminal_snr_is_that_of_diffusers(kind):
    plain, zero = make_schedule(kind), make_schedule(kind, zero_terminal_snr=True)
    torch.testing.assert_close(zero.betas, rescale_zero_terminal_snr(plain.betas), rtol=1e-9, atol=1e-12)
    assert zero.alpha_bar[0] == pytest.approx(plain.alpha_bar[0].item(), abs=1e-15)


def test_snr_is_signal_power_over_noise_power():
    schedule = Schedule(torch.tensor([0.9, 0.5, 0.2]).double())
    assert np.allclose(schedule.snr(), [9, 1, 0.25])


@pytest.mark.parametrize("call", [lambda: make_schedule("quadratic"), lambda: make_schedule(kind="")])
def test_unknown_schedules_are_refused(call):
    with pytest.raises(ValueError, match="choose linear, scaled_linear or cosine"):
        call()


# the forward process


def test_each_of_a_batch_has_its_own_step():
    schedule = SCHEDULES["linear"]
    x0, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 10, 500, 999])
    together = schedule.add_noise(x0, t, eps)
    for i in range(4):
        assert torch.equal(together[i : i + 1], schedule.add_noise(x0[i : i + 1], int(t[i]), eps[i : i + 1]))


def test_step_minus_one_is_clean():
    x0 = torch.randn(2, 3)
    assert torch.equal(SCHEDULES["cosine"].add_noise(x0, -1, torch.randn(2, 3)), x0)
    mixed = SCHEDULES["cosine"].at(torch.tensor([-1, 5]), x0)
    assert mixed.flatten().tolist() == pytest.approx([1.0, SCHEDULES["cosine"].alpha_bar[5].item()])


# the three targets


@given(any_step, number, number)
def test_v_is_the_velocity_of_a_rotation(t, x0, eps):
    angle = math.acos(math.sqrt(SCHEDULES["linear"].alpha_bar[t].item()))  # x_t = cos φ x0 + sin φ ε; v = dx_t/dφ
    v = SCHEDULES["linear"].target("v", scalar(x0), t, scalar(eps)).item()
    assert v == pytest.approx(-math.sin(angle) * x0 + math.cos(angle) * eps, abs=1e-7)


def test_an_unknown_target_is_refused():
    one = torch.ones(1, 1)
    for call in (SCHEDULES["linear"].target, SCHEDULES["linear"].x0_and_eps):
        with pytest.raises(ValueError, match='no target "noise": choose one of eps, x0, v'):
            call("noise", one, one, 3) if call.__name__ == "x0_and_eps" else call("noise", one, 3, one)


# the posterior


def test_the_posterior_of_the_clean_image_is_the_clean_image():
    mean, variance = SCHEDULES["linear"].posterior(scalar(0.3), scalar(2.0), 40, -1)
    assert (mean.item(), variance.item()) == (pytest.approx(0.3), 0)


def test_the_posterior_leads_from_one_marginal_to_the_one_before():
    schedule, generator = SCHEDULES["cosine"], seeded(0)
    x0 = torch.full((40_000, 1), 1.5)
    xt = schedule.add_noise(x0, 700, torch.randn(x0.shape, generator=generator))
    mean, variance = schedule.posterior(x0, xt, 700, 300)
    x = mean + variance.sqrt() * torch.randn(x0.shape, generator=generator)
    a = schedule.alpha_bar[300].item()
    assert x.mean().item() == pytest.approx(math.sqrt(a) * 1.5, abs=0.01)
    assert x.std().item() == pytest.approx(math.sqrt(1 - a), rel=0.02)


# the loss


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_of_the_exact_prediction_is_zero_and_of_nothing_the_target_s_power(target):
    schedule, x0 = SCHEDULES["scaled_linear"], torch.full((512, 1, 4, 4), 0.5)

    def exact(xt, t):  # knows the only image
        a = schedule.at(t, xt)
        return schedule.target(target, x0, t, (xt - a.sqrt() * x0) / (1 - a).sqrt())

    for logit_normal in (None, (0.0, 1.0), (-0.4, 0.8)):
        assert diffusion_loss(exact, schedule, x0, seeded(0), target, logit_normal).item() < 1e-7
    power = {"eps": 1, "x0": 0.25, "v": (schedule.alpha_bar + 0.25 * (1 - schedule.alpha_bar)).mean().item()}
    nothing = diffusion_loss(lambda xt, t: torch.zeros_like(xt), schedule, x0, seeded(0), target)
    assert nothing.item() == pytest.approx(power[target], rel=0.06)


def steps_of(
    batch: int, steps: int, generator: torch.Generator, logit_normal: tuple[float, float] | None = None
) -> torch.Tensor:
    """The steps (batch,) that the loss draws from a schedule of `steps`."""
    seen = []

    def model(xt, t):
        seen.append(t)
        return xt

    diffusion_loss(model, make_schedule(steps=steps), torch.zeros(batch, 1), generator, logit_normal=logit_normal)
    return seen[0]


@pytest.mark.parametrize("batch, steps", [(1, 1000), (8, 1000), (64, 1000), (125, 1000), (7, 10), (30, 10)])
def test_the_loss_draws_one_step_in_each_part_of_the_schedule(batch, steps):
    generator, i = seeded(0), torch.arange(batch)
    for _ in range(20):
        t = steps_of(batch, steps, generator)
        assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < steps
        assert (t * batch < (i + 1) * steps).all() and ((t + 1) * batch > i * steps).all()  # [t, t+1) / T meets part i
        if steps % batch == 0:
            assert torch.equal(t * batch // steps, i)
        if batch % steps == 0:
            assert (t.bincount(minlength=steps) == batch // steps).all()


@pytest.mark.parametrize("batch, steps", [(1, 10), (4, 12), (3, 10), (5, 4)])
def test_within_its_part_every_place_is_equally_likely(batch, steps):
    generator, n = seeded(1), 4000
    drawn = torch.stack([steps_of(batch, steps, generator) for _ in range(n)])  # (n, batch)
    for i in range(batch):
        overlap = [max(0, min((t + 1) / steps, (i + 1) / batch) - max(t / steps, i / batch)) for t in range(steps)]
        expected, found = n * batch * np.array(overlap), drawn[:, i].bincount(minlength=steps).numpy()
        possible = expected > 1e-9
        assert not found[~possible].any()
        if possible.sum() > 1:
            assert scipy.stats.chisquare(found[possible], expected[possible]).pvalue > 1e-3


def test_the_places_in_two_parts_have_nothing_to_do_with_each_other():
    generator = seeded(3)
    first, *_, last_one = torch.stack([steps_of(4, 12, generator) for _ in range(4000)], 1) % 3  # each (4000,)
    counts = (3 * first + last_one).bincount(minlength=9).view(3, 3)
    assert scipy.stats.chi2_contingency(counts).pvalue > 1e-3


def test_a_draw_that_rounds_up_to_the_end_stays_in_the_schedule(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 1 - 2**-24))  # the most torch.rand gives
    assert steps_of(64, 1000, seeded(0))[-1] == 999


def test_one_step_in_each_part_leaves_the_mean_of_the_loss_and_shrinks_its_spread():
    schedule, generator = SCHEDULES["cosine"], seeded(2)
    x0 = torch.full((16, 1, 16, 16), 0.5)
    by_step = schedule.alpha_bar * 0.25 + (1 - (1 - schedule.alpha_bar).sqrt()) ** 2  # E (x_t - ε)² for a constant 0.5
    found = torch.stack([diffusion_loss(lambda xt, t: xt, schedule, x0, generator) for _ in range(400)])
    assert found.mean().item() == pytest.approx(by_step.mean().item(), abs=4 * found.std().item() / 20)
    assert found.std().item() < 0.2 * by_step.std().item() / 4  # independent steps: std of the errors over √16


crowded = pytest.mark.parametrize("m, s", [(0.0, 1.0), (-0.4, 0.8), (1.0, 0.5)])


@crowded
@pytest.mark.parametrize("batch, n", [(1, 4000), (16, 500)])
def test_crowded_steps_have_a_normal_logit(m, s, batch, n):
    generator = seeded(4)
    t = torch.cat([steps_of(batch, 1000, generator, (m, s)) for _ in range(n)])
    share = (t + torch.rand(t.shape, generator=generator).double()) / 1000  # anywhere within its step
    assert scipy.stats.kstest(scipy.special.logit(share.numpy()), scipy.stats.norm(m, s).cdf).pvalue > 1e-3


@crowded
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_crowded_steps_are_one_in_each_equally_likely_part(m, s, batch):
    generator, i, steps = seeded(5), np.arange(batch), 100_000

    def place(share):  # of [0, 1], in parts
        return batch * scipy.stats.norm(m, s).cdf(scipy.special.logit(share))

    for _ in range(20):
        t = steps_of(batch, steps, generator, (m, s)).numpy()
        assert (place(t / steps) < i + 1.001).all() and (place((t + 1) / steps) > i - 0.001).all()  # float32 places


@crowded
@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-24])  # the least and the most that torch.rand gives
def test_crowded_steps_stay_in_the_schedule_at_both_ends(m, s, drawn, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), drawn))
    for batch in (1, 64):
        t = steps_of(batch, 1000, seeded(0), (m, s))
        assert t.min() >= 0 and t.max() <= 999 and (t.diff() >= 0).all()
    assert t[0 if drawn == 0 else -1] == (0 if drawn == 0 else 999)  # of the 64: the place is 0, or rounds to 1


@crowded
def test_crowded_steps_weigh_the_losses_of_the_steps(m, s):
    schedule, x0 = SCHEDULES["cosine"], torch.full((4000, 1, 16, 16), 0.5)
    by_step = schedule.alpha_bar * 0.25 + (1 - (1 - schedule.alpha_bar).sqrt()) ** 2  # E (x_t - ε)² for a constant 0.5
    weights = np.diff(scipy.stats.norm(m, s).cdf(scipy.special.logit(np.arange(1001) / 1000)))
    loss = diffusion_loss(lambda xt, t: xt, schedule, x0, seeded(6), logit_normal=(m, s)).item()
    assert loss == pytest.approx((weights * by_step.numpy()).sum(), rel=0.01)


def test_the_loss_passes_the_conditioning_on():
    def model(xt, t, tokens):
        assert tokens == "seven"
        return xt

    diffusion_loss(model, make_schedule(steps=10), torch.zeros(5, 1), seeded(0), tokens="seven")


def test_the_loss_hides_the_image_under_the_noise_of_its_step():
    schedule = SCHEDULES["linear"]

    def model(xt, t):
        torch.testing.assert_close(xt.std(1), (1 - schedule.alpha_bar[t]).sqrt().float(), rtol=0.1, atol=0)
        torch.testing.assert_close(xt.mean(1), 7 * schedule.alpha_bar[t].sqrt().float(), rtol=0, atol=0.1)
        return xt

    diffusion_loss(model, schedule, torch.full((20, 4000), 7.0), seeded(0))


# ancestral sampling


def test_ancestral_sampling_with_the_ideal_denoiser_draws_from_the_data():
    schedule = make_schedule("cosine", 200)
    data = GaussianMixture(torch.tensor([[-1.0], [2.0]]).double(), 0.3)
    x = torch.randn(8000, 1, generator=seeded(0)).double()
    x = last(ddpm_sample(ideal_denoise(data, schedule), schedule, x, list(range(199, -1, -1)), seeded(1)))
    assert (x > 0.5).double().mean().item() == pytest.approx(0.5, abs=0.02)
    for side, mean in ((x[x < 0.5], -1.0), (x[x > 0.5], 2.0)):
        assert side.mean().item() == pytest.approx(mean, abs=0.03)
        assert side.std().item() == pytest.approx(0.3, rel=0.05)
