# Exported from notebooks/03_autoencoder.ipynb by tools/export.py: edit the notebook, not this file.
"""What the first stage minimises, and how good a reconstruction is."""

from collections.abc import Callable

import torch

from minildm.autoencoder import AutoencoderKL
from minildm.data import to_float
from minildm.training import batch_indices
from minildm.vae import DiagonalGaussian


def kl_autoencoder_loss(
    x_hat: torch.Tensor, x: torch.Tensor, posterior: DiagonalGaussian, kl_weight: float = 1e-6
) -> torch.Tensor:
    """Reconstruction plus a little KL for images (B, C, H, W), a scalar (LDM eq. 25 without perceptual and adversary).

    Both terms are summed over an image, as in the paper, where kl_weight = 1e-6 stands before a sum over all latents;
    the total is then divided by the number of pixel values, so that learning rates carry over between image sizes.
    The reconstruction term is |x - x̂| + (x - x̂)²: the first keeps edges sharp, the second punishes outliers.
    """
    error = (x_hat - x).flatten(1)
    reconstruction = (error.abs() + error**2).sum(1)  # (B,)
    return (reconstruction + kl_weight * posterior.kl()).mean() / error.shape[1]


def psnr(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image (B, C, H, W) in [-1, 1], in decibels, (B,): 10 log10(2² / MSE)."""
    mse = ((x_hat - x) ** 2).flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp(min=1e-12))


def first_stage_loss_fn(
    images: torch.Tensor, batch_size: int, kl_weight: float = 1e-6
) -> Callable[[AutoencoderKL, torch.Generator], torch.Tensor]:
    """The first stage's loss_fn for `train`, on uint8 images (N, C, H, W)."""

    def loss_fn(model: AutoencoderKL, generator: torch.Generator) -> torch.Tensor:
        device = next(model.parameters()).device
        x = to_float(images[batch_indices(len(images), batch_size, generator)]).to(device)
        posterior = model.encode(x)
        return kl_autoencoder_loss(model.decode(posterior.sample(generator)), x, posterior, kl_weight)

    return loss_fn
