"""Lesson 01: the ELBO against quadrature, and the ideal denoiser of the toy data against the score of its density."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate
from torch import distributions as dist

from minildm.data import seeded
from minildm.toy import GaussianMixture, ring
from minildm.vae import VAE, DiagonalGaussian, elbo_terms

number = st.floats(-3, 3)


@given(st.lists(st.tuples(number, number), min_size=1, max_size=5))
def test_kl_is_that_of_torch_distributions(pairs):
    mean, log_variance = torch.tensor(pairs, dtype=torch.float64).T
    ours = DiagonalGaussian(torch.cat([mean, log_variance])[None]).kl()
    theirs = dist.kl_divergence(dist.Normal(mean, (log_variance / 2).exp()), dist.Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(ours, theirs[None])


def test_kl_sums_over_all_but_the_batch():
    moments = torch.randn(3, 4, 5, 6, generator=seeded(0))
    parts = [DiagonalGaussian(moments[i : i + 1, :, h : h + 1, w : w + 1]).kl() for i in range(3)
             for h in range(5) for w in range(6)]  # fmt: skip
    torch.testing.assert_close(DiagonalGaussian(moments).kl(), torch.stack(parts).view(3, 30).sum(1))


def test_samples_have_the_posterior_s_mean_and_deviation():
    posterior = DiagonalGaussian(torch.tensor([[2.0, -1.0, math.log(0.25), math.log(9.0)]]).expand(40_000, 4))
    z = posterior.sample(seeded(0))
    torch.testing.assert_close(z.mean(0), torch.tensor([2.0, -1.0]), rtol=0, atol=0.05)
    torch.testing.assert_close(z.std(0), torch.tensor([0.5, 3.0]), rtol=0.02, atol=0)
    assert torch.equal(z, posterior.sample(seeded(0))) and not torch.equal(z, posterior.sample(seeded(1)))


def test_the_sample_is_differentiable_in_mean_and_log_variance():
    moments = torch.tensor([[0.3, 0.8]], dtype=torch.float64, requires_grad=True)
    z = DiagonalGaussian(moments).sample(seeded(0))
    z.sum().backward()
    noise = ((z - 0.3) / math.exp(0.4)).item()
    torch.testing.assert_close(moments.grad, torch.tensor([[1.0, 0.5 * math.exp(0.4) * noise]]).double())


def test_extreme_log_variances_stay_finite():
    moments = torch.tensor([[0.0, 1e4], [0.0, -1e4]], requires_grad=True)
    posterior = DiagonalGaussian(moments)
    (posterior.kl().sum() + posterior.sample(seeded(0)).sum()).backward()
    assert torch.isfinite(posterior.kl()).all() and torch.isfinite(moments.grad).all()


def test_vae_shapes():
    vae = VAE((1, 8, 8), latent=3, width=16)
    x = torch.randn(5, 1, 8, 8)
    assert vae.posterior(x).mean.shape == (5, 3)
    assert vae.decode(torch.randn(5, 3)).shape == (5, 1, 8, 8)
    assert [term.shape for term in elbo_terms(vae, x, seeded(0))] == [(5,), (5,)]


@pytest.fixture(scope="module")
def line_vae():
    """A VAE of points in the plane with one latent, in float64."""
    torch.manual_seed(0)
    return VAE((2,), latent=1, width=8, sigma=0.7).double().requires_grad_(False)


def joint(vae: VAE, x: torch.Tensor, z: float) -> float:
    """p(x, z), by torch.distributions."""
    x_hat = vae.decode(torch.tensor([[z]], dtype=torch.float64))[0]
    log_p = dist.Normal(x_hat, vae.sigma).log_prob(x).sum() + dist.Normal(0.0, 1.0).log_prob(torch.tensor(z))
    return log_p.exp().item()


def test_the_elbo_misses_the_evidence_by_the_kl_to_the_true_posterior(line_vae):
    x = torch.tensor([0.4, -0.9], dtype=torch.float64)
    evidence, _ = integrate.quad(lambda z: joint(line_vae, x, z), -8, 8)
    posterior = line_vae.posterior(x[None])
    q = dist.Normal(posterior.mean.item(), posterior.std.item())

    def gap_density(z):  # q log (q / p(z | x))
        log_q = q.log_prob(torch.tensor(z)).item()
        return math.exp(log_q) * (log_q - math.log(joint(line_vae, x, z) / evidence))

    gap, _ = integrate.quad(gap_density, q.mean.item() - 8 * q.stddev.item(), q.mean.item() + 8 * q.stddev.item())
    distortion, kl = elbo_terms(line_vae, x.expand(100_000, 2), seeded(0))
    assert gap > 0.01
    assert (distortion + kl).mean().item() == pytest.approx(-math.log(evidence) + gap, abs=0.01)


def test_distortion_is_the_log_density_of_the_decoder(line_vae):
    x = torch.randn(6, 2, generator=seeded(1)).double()
    x_hat = line_vae.decode(line_vae.posterior(x).sample(seeded(2)))
    distortion, kl = elbo_terms(line_vae, x, seeded(2))
    torch.testing.assert_close(distortion, -dist.Normal(x_hat, line_vae.sigma).log_prob(x).sum(1))
    torch.testing.assert_close(kl, line_vae.posterior(x).kl())


# the toy data


def noisy_density(data: GaussianMixture, alpha_bar: float) -> dist.Distribution:
    """p(x_t) of a mixture: again a mixture, shrunk and widened."""
    k, d = data.means.shape
    width = math.sqrt(alpha_bar * data.std**2 + 1 - alpha_bar)
    means = math.sqrt(alpha_bar) * data.means
    parts = dist.Independent(dist.Normal(means, width * torch.ones(k, d, dtype=means.dtype)), 1)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(k, dtype=means.dtype)), parts)


@given(alpha_bar=st.floats(0.01, 0.99), std=st.floats(0, 0.5), seed=st.integers(0, 100))
def test_the_ideal_denoiser_obeys_tweedie(alpha_bar, std, seed):
    data = GaussianMixture(torch.randn(4, 2, generator=seeded(seed)).double(), std)
    xt = torch.randn(5, 2, generator=seeded(seed + 1)).double().requires_grad_()
    (score,) = torch.autograd.grad(noisy_density(data, alpha_bar).log_prob(xt).sum(), xt)
    expected = (xt + (1 - alpha_bar) * score) / math.sqrt(alpha_bar)  # E[x0 | xt] = (xt + (1-ᾱ) ∇ log p(xt)) / √ᾱ
    torch.testing.assert_close(data.denoise(xt, alpha_bar), expected)


def test_the_ideal_denoiser_is_the_integral_over_all_x0():
    data, alpha_bar, xt = GaussianMixture(torch.tensor([[-1.0], [0.5]]).double(), 0.3), 0.4, 0.2

    def density(x0):  # p(x0) p(xt | x0), up to a factor
        prior = sum(math.exp(-((x0 - m) ** 2) / (2 * 0.3**2)) for m in (-1.0, 0.5))
        return prior * math.exp(-((xt - math.sqrt(alpha_bar) * x0) ** 2) / (2 * (1 - alpha_bar)))

    top, _ = integrate.quad(lambda x0: x0 * density(x0), -6, 6)
    bottom, _ = integrate.quad(density, -6, 6)
    denoised = data.denoise(torch.tensor([[xt]], dtype=torch.float64), alpha_bar)
    assert denoised.item() == pytest.approx(top / bottom, rel=1e-8)


def test_the_ideal_denoiser_at_both_ends():
    data = ring()
    x = torch.tensor([[0.7, 1.1], [-0.2, 0.4]])
    torch.testing.assert_close(data.denoise(x, 1 - 1e-7), x, rtol=0, atol=1e-3)
    torch.testing.assert_close(data.denoise(x, 1e-9), torch.zeros(2, 2), rtol=0, atol=1e-3)  # the mean of the ring


def test_ring_samples_lie_evenly_around_points_on_a_circle():
    data = ring(k=6, radius=2.0, std=0.05)
    torch.testing.assert_close(data.means.norm(dim=1), torch.full((6,), 2.0))
    x = data.sample(12_000, seeded(0))
    distance, nearest = torch.cdist(x, data.means).min(1)
    assert (nearest.bincount(minlength=6) - 2000).abs().max() < 200
    assert (distance**2).mean().sqrt().item() == pytest.approx(0.05 * math.sqrt(2), rel=0.03)
    assert torch.pdist(data.means).min().item() == pytest.approx(2.0, rel=1e-5)  # of a hexagon: the radius
