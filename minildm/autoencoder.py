# Exported from notebooks/03_autoencoder.ipynb by tools/export.py: edit the notebook, not this file.
"""The first stage: an encoder and a decoder that remove imperceptible detail, and the scale of their latents."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from minildm.vae import DiagonalGaussian


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder; the compression factor is f = 2^(len(multipliers) - 1).

    Level i works on `channels · multipliers[i]` channels at 1/2^i of the image's size, with `res_blocks` residual
    blocks (one more in the decoder). `attention` puts self-attention in the middle. `latent_shift` and `latent_scale`
    hold, for each latent channel, the mean and 1/deviation measured after training; empty means not measured yet.
    """

    in_channels: int = 1
    latent_channels: int = 4
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    res_blocks: int = 1
    attention: bool = False
    groups: int = 8
    latent_shift: tuple[float, ...] = ()
    latent_scale: tuple[float, ...] = ()

    @property
    def factor(self) -> int:
        """The compression factor f: an image (H, W) has latents (H/f, W/f)."""
        return 2 ** (len(self.multipliers) - 1)


class ResBlock(nn.Module):
    """GroupNorm → SiLU → 3×3 conv, twice, added to the input: (B, in, H, W) → (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, added to the input: (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        h = self.to_out(F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Halve the size with a strided 3×3 conv, padded on the right and below only: (B, C, H, W) → (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size by repeating pixels, then a 3×3 conv: (B, C, H, W) → (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int, config: AutoencoderConfig) -> nn.Sequential:
    """Residual block, attention if wanted, residual block, at the smallest size."""
    attention = [AttentionBlock(channels, config.groups)] if config.attention else []
    return nn.Sequential(
        ResBlock(channels, channels, config.groups), *attention, ResBlock(channels, channels, config.groups)
    )


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) → (B, out_channels, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig, out_channels: int):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            blocks = [ResBlock(before if j == 0 else width, width, config.groups) for j in range(config.res_blocks)]
            last = i == len(widths) - 1
            self.levels.append(nn.Sequential(*blocks, *([] if last else [Downsample(width)])))
        self.middle = _middle(widths[-1], config)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Latents (B, latent_channels, H/f, W/f) → images (B, in_channels, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = _middle(widths[0], config)
        self.levels = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            blocks = [ResBlock(before if j == 0 else width, width, config.groups) for j in range(config.res_blocks + 1)]
            last = i == len(widths) - 1
            self.levels.append(nn.Sequential(*blocks, *([] if last else [Upsample(width)])))
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.middle(self.conv_in(z))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """The KL-regularised autoencoder (LDM section 3.1 and appendix G).

    `encode` gives the posterior, `decode` takes raw latents; `to_latents` and `from_latents` are what the second stage
    uses: latents shifted and scaled to mean 0 and deviation 1 in each channel.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, 2 * config.latent_channels)
        self.to_moments = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.from_z = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: torch.Tensor) -> DiagonalGaussian:
        """q(z | x) for images x (B, in_channels, H, W) in [-1, 1]; its mean is (B, latent_channels, H/f, W/f).

        Raises ValueError when the number of channels is wrong or f does not divide the size.
        """
        f = self.config.factor
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % f or x.shape[3] % f:
            wanted = f"(B, {self.config.in_channels}, H, W) with H and W divisible by {f}"
            raise ValueError(f"images must be {wanted}, not {tuple(x.shape)}.")
        return DiagonalGaussian(self.to_moments(self.encoder(x)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, latent_channels, h, w) → images (B, in_channels, f·h, f·w), about [-1, 1]."""
        return self.decoder(self.from_z(z))

    def standardise(self, z: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, latent_channels, h, w) → (z - shift) · scale: mean 0 and deviation 1 in each channel.

        Raises ValueError before `set_latent_statistics` was called.
        """
        shift, scale = self._statistics(z)
        return (z - shift) * scale

    def to_latents(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] → standardised posterior means (B, latent_channels, H/f, W/f)."""
        return self.standardise(self.encode(x).mean)

    def from_latents(self, z: torch.Tensor) -> torch.Tensor:
        """Standardised latents (B, latent_channels, h, w) → images (B, in_channels, f·h, f·w)."""
        shift, scale = self._statistics(z)
        return self.decode(z / scale + shift)

    def set_latent_statistics(self, z: torch.Tensor) -> None:
        """Measure each channel's mean and 1/deviation on raw latents (B, latent_channels, h, w); kept in the config."""
        shift, scale = z.mean((0, 2, 3)), 1 / z.std((0, 2, 3))
        self.config = replace(self.config, latent_shift=tuple(shift.tolist()), latent_scale=tuple(scale.tolist()))

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.config.latent_scale:
            raise ValueError("the latents have no scale yet: call set_latent_statistics on those of training images.")
        values = (self.config.latent_shift, self.config.latent_scale)
        return tuple(torch.tensor(v, device=like.device, dtype=like.dtype).view(-1, 1, 1) for v in values)
