# Exported from notebooks/01_vae_vs_diffusion.ipynb by tools/export.py: edit the notebook, not this file.
"""Two-dimensional toy data whose ideal denoiser is known in closed form."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GaussianMixture:
    """Equal-weight mixture of K round Gaussians: `means` (K, D), one standard deviation `std` (0: the means alone)."""

    means: torch.Tensor
    std: float

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """n draws, (n, D)."""
        component = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.std * noise

    def denoise(self, xt: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        """E[x0 | xt] (B, D) for xt = √ᾱ x0 + √(1-ᾱ) ε (B, D): what a perfectly trained network would predict.

        Given the component k, x0 and xt are jointly Gaussian, so E[x0 | xt, k] is linear in xt; the components are
        then weighted by p(k | xt), a softmax of squared distances.
        """
        a = math.sqrt(alpha_bar)
        variance = alpha_bar * self.std**2 + (1 - alpha_bar)
        residual = xt[:, None] - a * self.means  # (B, K, D)
        weight = torch.softmax(-(residual**2).sum(-1) / (2 * variance), dim=1)  # (B, K)
        mean = self.means + a * self.std**2 / variance * residual  # (B, K, D)
        return (weight[..., None] * mean).sum(1)


def ring(k: int = 8, radius: float = 1.5, std: float = 0.08) -> GaussianMixture:
    """K Gaussians on a circle, in the plane."""
    angle = 2 * math.pi * torch.arange(k) / k
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std)
