# Exported from notebooks/05_cross_attention.ipynb by tools/export.py: edit the notebook, not this file.
"""A judge that the generator never meets: a digit classifier, and distances between sets of its features."""

import torch
import torch.nn.functional as F
from torch import nn

from minildm.data import to_float


class DigitClassifier(nn.Module):
    """A small convolutional network: images (B, 1, 32, 32) in [-1, 1] → logits (B, 10)."""

    def __init__(self, channels: int = 32, feature_dim: int = 128):
        super().__init__()
        self.body = nn.Sequential(
            *_conv(1, channels, stride=2),
            *_conv(channels, 2 * channels),
            *_conv(2 * channels, 2 * channels, stride=2),
            *_conv(2 * channels, 4 * channels),
            *_conv(4 * channels, 4 * channels, stride=2),
            nn.Flatten(),
            nn.Linear(4 * channels * 16, feature_dim),
            nn.SiLU(),
        )
        self.head = nn.Linear(feature_dim, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, 32, 32) in [-1, 1] → the features before the last layer (B, feature_dim)."""
        return self.body(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def _conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()]


def shifted_and_sheared(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image (B, C, H, W) in [-1, 1] turned, sheared, scaled and moved a little at random, the outside black."""
    n = len(images)
    turn, shear, zoom, dx, dy = (torch.rand(5, n, generator=generator) * 2 - 1) * torch.tensor(
        [[0.15], [0.15], [0.1], [0.12], [0.12]]
    )
    cos, sin, zoom = turn.cos(), turn.sin(), 1 + zoom
    matrix = torch.stack([zoom * cos, -sin + shear, dx, sin, zoom * cos, dy], 1).view(n, 2, 3)
    grid = F.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # +1: the outside is 0


def classifier_loss(x_train: torch.Tensor, y_train: torch.Tensor, batch_size: int = 128):
    """A loss_fn(model, generator) for `training.train`: cross-entropy on augmented batches of uint8 images.

    A random 30 % of the features are dropped; by hand, because F.dropout does not draw from our generator.
    """

    def loss_fn(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(x_train), (batch_size,), generator=generator)
        device = next(model.parameters()).device
        images = shifted_and_sheared(to_float(x_train[index]), generator)
        features = model.features(images.to(device))
        kept = (torch.rand(features.shape, generator=generator) >= 0.3).to(features)
        return F.cross_entropy(model.head(features * kept / 0.7), y_train[index].to(device), label_smoothing=0.05)

    return loss_fn


@torch.no_grad()
def predict(classifier: DigitClassifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (N,) read off images (N, 1, 32, 32) in [-1, 1], and their features (N, feature_dim), on the CPU."""
    device = next(classifier.parameters()).device
    features = torch.cat([classifier.features(batch.to(device)) for batch in images.split(500)])
    return classifier.head(features).argmax(1).cpu(), features.cpu()


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Fréchet distance between Gaussians fitted to two sets of features, (N, D) each (Heusel et al., 2017, eq. 6).

    |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½), in float64; a covariance may be singular. Few samples bias it upwards, so
    only values at the same N can be compared: sets of different sizes raise ValueError.
    """
    if a.shape != b.shape or a.ndim != 2 or len(a) < 2:
        raise ValueError(
            f"both sets must have the same shape (N, D) with N > 1, not {tuple(a.shape)}, {tuple(b.shape)}."
        )
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # Σa^½
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()  # tr (Σa^½ Σb Σa^½)^½
    return (((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()
