# Exported from notebooks/01_vae_vs_diffusion.ipynb by tools/export.py: edit the notebook, not this file.
"""The variational autoencoder: a learned posterior, one jump, and the ELBO in nats."""

import math

import torch
from torch import nn


class DiagonalGaussian:
    """A Gaussian with independent components, given by `moments` (B, 2C, …): mean, then log variance.

    The log variance is clamped to [-30, 20], so that neither exp nor its gradient overflows.
    """

    def __init__(self, moments: torch.Tensor):
        self.mean, log_variance = moments.chunk(2, dim=1)  # each (B, C, …)
        self.log_variance = log_variance.clamp(-30, 20)
        self.std = torch.exp(0.5 * self.log_variance)

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """mean + std · ε with ε ~ N(0, I) (B, C, …): the reparametrisation, differentiable in the moments."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self) -> torch.Tensor:
        """KL(N(mean, std²) ‖ N(0, I)) in nats, summed over all but the batch: (B,). Kingma & Welling, appendix B."""
        nats = 0.5 * (self.mean**2 + self.log_variance.exp() - 1 - self.log_variance)
        return nats.flatten(1).sum(1)


class VAE(nn.Module):
    """A small VAE of fully connected layers, for images (B, 1, size, size) in [-1, 1] or any vectors of that length.

    `latent` is the length of z. The decoder gives the mean of a Gaussian with the fixed standard deviation `sigma`.
    """

    def __init__(self, shape: tuple[int, ...] = (1, 32, 32), latent: int = 16, width: int = 512, sigma: float = 0.3):
        super().__init__()
        self.shape, self.latent, self.sigma = tuple(shape), latent, sigma
        n = math.prod(shape)
        self.encoder = nn.Sequential(nn.Flatten(), *_mlp(n, width, 2 * latent))
        self.decoder = nn.Sequential(*_mlp(latent, width, n), nn.Unflatten(1, self.shape))

    def posterior(self, x: torch.Tensor) -> DiagonalGaussian:
        """q(z | x) for x (B, *shape); its mean is (B, latent)."""
        return DiagonalGaussian(self.encoder(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """The mean of p(x | z) for z (B, latent): (B, *shape)."""
        return self.decoder(z)


def _mlp(inputs: int, width: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)]


def elbo_terms(vae: VAE, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of -ELBO in nats an image, each (B,): -log p(x | z) at one z ~ q(z | x), and KL(q(z | x) ‖ p(z)).

    -ELBO is their sum, an upper bound on -log p(x) (Kingma & Welling, eq. 3).
    """
    posterior = vae.posterior(x)
    x_hat = vae.decode(posterior.sample(generator))
    squared = ((x - x_hat) ** 2).flatten(1)  # (B, D)
    distortion = 0.5 * (squared / vae.sigma**2 + math.log(2 * math.pi * vae.sigma**2)).sum(1)
    return distortion, posterior.kl()
