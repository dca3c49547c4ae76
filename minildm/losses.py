# Exported from notebooks/03_autoencoder.ipynb by tools/export.py: edit the notebook, not this file.
"""What the first stage minimises, and how good a reconstruction is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from minildm.autoencoder import Autoencoder, AutoencoderKL, AutoencoderVQ
from minildm.data import to_float
from minildm.training import batch_indices
from minildm.vae import DiagonalGaussian


def kl_autoencoder_loss(
    x_hat: torch.Tensor, x: torch.Tensor, posterior: DiagonalGaussian, kl_weight: float = 1e-6
) -> torch.Tensor:
    """Reconstruction plus a little KL for images (B, C, H, W), a scalar (LDM eq. 25 without perceptual and adversary).

    Both terms are summed over an image, as in the paper, where kl_weight = 1e-6 stands before a sum over all latents;
    the total is then divided by the number of pixel values, so that its gradient, which `train` clips, has one size for
    images of all sizes.
    The reconstruction term is |x - x̂| + (x - x̂)²: the first keeps edges sharp, the second punishes outliers.
    """
    error = (x_hat - x).flatten(1)
    reconstruction = (error.abs() + error**2).sum(1)  # (B,)
    return (reconstruction + kl_weight * posterior.kl()).mean() / error.shape[1]


def psnr(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image (B, C, H, W) in [-1, 1], in decibels, (B,): 10 log10(2² / MSE)."""
    mse = ((x_hat - x) ** 2).flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp(min=1e-12))


def ssim(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (B, C, H, W) in [-1, 1], (B,), at most 1 (Wang et al., 2004, eq. 13).

    Images are brought to [0, 1]. Means, variances and covariance are taken in Gaussian windows of 11×11 pixels with
    deviation 1.5 that lie within the image. Raises ValueError for images smaller than a window.
    """
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11×11 pixels, not {x.shape[-2]}×{x.shape[-1]}.")
    bell = torch.exp(-torch.arange(-5, 6, device=x.device, dtype=x.dtype).square() / (2 * 1.5**2))
    window = torch.outer(bell, bell) / bell.sum() ** 2  # (11, 11)

    def local(v: torch.Tensor) -> torch.Tensor:  # means in the windows: (B, C, H-10, W-10)
        return F.conv2d(v.flatten(0, 1)[:, None], window[None, None]).unflatten(0, v.shape[:2])[:, :, 0]

    x_hat, x = (x_hat + 1) / 2, (x + 1) / 2
    a, b, c1, c2 = local(x_hat), local(x), 0.01**2, 0.03**2
    var_a, var_b, cov = local(x_hat**2) - a**2, local(x**2) - b**2, local(x_hat * x) - a * b
    similarity = (2 * a * b + c1) * (2 * cov + c2) / ((a**2 + b**2 + c1) * (var_a + var_b + c2))
    return similarity.flatten(1).mean(1)


class FeatureNet(nn.Module):
    """A small digit classifier, used for its layers: images (B, in_channels, H, W) in [-1, 1] → logits (B, 10)."""

    def __init__(self, in_channels: int = 1, widths: tuple[int, ...] = (16, 32, 64)):
        super().__init__()
        inputs = (in_channels, *widths[:-1])
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(inputs, widths, strict=True))
        self.head = nn.Linear(widths[-1], 10)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The maps of each layer, (B, widths[i], H/2^i, W/2^i)."""
        maps = []
        for conv in self.convs:
            maps.append(F.relu(conv(F.max_pool2d(maps[-1], 2) if maps else x)))
        return maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x)[-1].amax((2, 3)))


def feature_net_loss_fn(
    images: torch.Tensor, labels: torch.Tensor, batch_size: int
) -> Callable[[FeatureNet, torch.Generator], torch.Tensor]:
    """Cross-entropy of a FeatureNet for `train`, on uint8 images (N, C, H, W) and their labels (N,)."""

    def loss_fn(model: FeatureNet, generator: torch.Generator) -> torch.Tensor:
        device, index = next(model.parameters()).device, batch_indices(len(images), batch_size, generator)
        return F.cross_entropy(model(to_float(images[index]).to(device)), labels[index].to(device))

    return loss_fn


def perceptual_distance(net: FeatureNet, x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """How differently a network sees images (B, C, H, W) in [-1, 1]: (B,) (Zhang et al., 2018, eq. 1, all weights 1).

    In each layer the channels at a position are brought to length 1; the squared difference is summed over channels,
    averaged over positions and summed over layers.
    """
    total = x.new_zeros(len(x))
    for a, b in zip(net.features(x_hat), net.features(x), strict=True):
        a, b = (v * (v.square().sum(1, keepdim=True) + 1e-6).rsqrt() for v in (a, b))
        total = total + (a - b).square().sum(1).mean((1, 2))
    return total


class PatchDiscriminator(nn.Module):
    """Real or reconstructed, patch by patch: images (B, in_channels, H, W) → logits (B, 1, H/4, W/4).

    Each logit sees 18×18 pixels (Isola et al., 2017), and through the group normalisation, which stands in place of
    batch normalisation, the image's mean and variance; above 0 means real.
    """

    def __init__(self, in_channels: int = 1, channels: int = 16):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, 2, 1),
            nn.GroupNorm(4, 2 * channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 1, 3, 1, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss, a scalar: logits of real images should be above 1, those of fakes below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def fooling_loss(fake: torch.Tensor) -> torch.Tensor:
    """The other side of `hinge_loss`, for the autoencoder, a scalar: the higher the logits of its images the better."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor, delta: float = 1e-4
) -> torch.Tensor:
    """λ = |∇ reconstruction| / (|∇ adversarial| + δ), gradients on the decoder's last layer, a scalar from 0 to 10,000.

    The two losses are scalars whose graphs are kept; λ carries no gradient (Esser et al., 2021, eq. 7).
    """
    pull = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    push = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (pull / (push + delta)).clamp(max=1e4).detach()


@dataclass(frozen=True)
class Objective:
    """The weights of the terms of the first stage's objective; `start` is the share of the budget without adversary."""

    kl: float = 1e-6
    codebook: float = 1.0
    perceptual: float = 0.0
    adversarial: float = 0.0
    start: float = 0.5

    def __post_init__(self):
        for name in ("kl", "codebook", "perceptual", "adversarial"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"the weight {name} must be a number of at least 0, not {getattr(self, name)}.")
        if not 0 <= self.start <= 1:
            raise ValueError(f"start must be a share of the budget between 0 and 1, not {self.start}.")


class FirstStage(nn.Module):
    """What the first stage trains, as one module: an autoencoder, and its discriminator or None."""

    def __init__(self, autoencoder: AutoencoderKL | AutoencoderVQ, discriminator: PatchDiscriminator | None = None):
        super().__init__()
        self.autoencoder, self.discriminator = autoencoder, discriminator


class Terms(NamedTuple):
    """The terms of LDM eq. 25, scalars, each with its weight; their sum is minimised."""

    reconstruction: torch.Tensor
    perceptual: torch.Tensor
    regularisation: torch.Tensor
    adversarial: torch.Tensor
    discriminator: torch.Tensor

    def total(self) -> torch.Tensor:
        """The sum of the terms, a scalar."""
        return sum(self)


def regularised(
    autoencoder: AutoencoderKL | AutoencoderVQ, x: torch.Tensor, generator: torch.Generator, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂ (B, C, H, W) and L_reg, a scalar a pixel value: the weighted KL of `kl_autoencoder_loss`, or a codebook's loss.

    A codebook is also updated, as this is a training step.
    """
    if isinstance(autoencoder, AutoencoderKL):
        posterior = autoencoder.encode(x)
        x_hat = autoencoder.decode(posterior.sample(generator))
        return x_hat, objective.kl * posterior.kl().mean() / x[0].numel()
    z = autoencoder.encode(x)
    quantised = autoencoder.quantiser(z)
    autoencoder.quantiser.update(z, quantised.indices, generator)
    return autoencoder.decoder(autoencoder.from_z(quantised.z)), objective.codebook * quantised.loss


def adversarial_terms(
    autoencoder: Autoencoder,
    discriminator: PatchDiscriminator,
    x_hat: torch.Tensor,
    x: torch.Tensor,
    reconstruction: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """λ · L_adv, which moves the autoencoder only, and the hinge loss, which moves the discriminator only; scalars."""
    discriminator.requires_grad_(False)
    adversarial = fooling_loss(discriminator(x_hat))
    discriminator.requires_grad_(True)
    weight = adaptive_weight(reconstruction, adversarial, autoencoder.last_layer)
    return weight * adversarial, hinge_loss(discriminator(x), discriminator(x_hat.detach()))


def first_stage_terms(
    autoencoder: AutoencoderKL | AutoencoderVQ,
    x: torch.Tensor,
    generator: torch.Generator,
    objective: Objective,
    net: FeatureNet | None = None,
    discriminator: PatchDiscriminator | None = None,
) -> Terms:
    """LDM eq. 25 on images x (B, C, H, W) in [-1, 1]: L_rec - L_adv + log D + L_reg, each written as a loss.

    `net` measures the perceptual part of L_rec; without it, or without a discriminator, those terms are 0.
    """
    x_hat, regularisation = regularised(autoencoder, x, generator, objective)
    reconstruction = ((x_hat - x).abs() + (x_hat - x) ** 2).mean()
    perceptual = adversarial = hinge = x.new_zeros(())
    if net is not None:
        perceptual = objective.perceptual * perceptual_distance(net, x_hat, x).mean()
    if discriminator is not None:
        adversarial, hinge = adversarial_terms(autoencoder, discriminator, x_hat, x, reconstruction + perceptual)
        adversarial = objective.adversarial * adversarial
    return Terms(reconstruction, perceptual, regularisation, adversarial, hinge)


def first_stage_loss_fn(
    images: torch.Tensor, batch_size: int, kl_weight: float = 1e-6
) -> Callable[[AutoencoderKL | AutoencoderVQ, torch.Generator], torch.Tensor]:
    """The plain loss_fn for `train`, on uint8 images (N, C, H, W): reconstruction and regularisation only."""

    def loss_fn(model: AutoencoderKL | AutoencoderVQ, generator: torch.Generator) -> torch.Tensor:
        device = next(model.parameters()).device
        x = to_float(images[batch_indices(len(images), batch_size, generator)]).to(device)
        if isinstance(model, AutoencoderVQ):
            return first_stage_terms(model, x, generator, Objective()).total()
        posterior = model.encode(x)
        return kl_autoencoder_loss(model.decode(posterior.sample(generator)), x, posterior, kl_weight)

    return loss_fn


def objective_loss_fn(
    images: torch.Tensor,
    batch_size: int,
    objective: Objective,
    net: FeatureNet | None = None,
    progress: Callable[[], float] = lambda: 1.0,
) -> Callable[[FirstStage, torch.Generator], torch.Tensor]:
    """The whole objective as a loss_fn for `train`, on uint8 images (N, C, H, W).

    The adversary, where the model has one, takes part once `progress()`, the share of the budget spent, reaches
    `objective.start`.
    """

    def loss_fn(model: FirstStage, generator: torch.Generator) -> torch.Tensor:
        device = next(model.parameters()).device
        x = to_float(images[batch_indices(len(images), batch_size, generator)]).to(device)
        discriminator = model.discriminator if progress() >= objective.start else None
        return first_stage_terms(model.autoencoder, x, generator, objective, net, discriminator).total()

    return loss_fn
