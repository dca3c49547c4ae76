# Exported from notebooks/03_autoencoder.ipynb by tools/export.py: edit the notebook, not this file.
"""The first stage: an encoder and a decoder that remove imperceptible detail, and the scale of their latents."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from minildm.vae import DiagonalGaussian


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder; the compression factor is f = patch · 2^(len(multipliers) - 1).

    Images enter and leave as patches of `patch` · `patch` pixels, folded into channels; 1 leaves them as they are.
    Level i works on `channels · multipliers[i]` channels at 1/2^i of the size that patches leave, with `res_blocks`
    residual blocks (one more in the decoder). `attention` puts self-attention in the middle. `codes` is the size of
    the codebook of an AutoencoderVQ, and 0 for an AutoencoderKL. `latent_shift` and `latent_scale` hold, for each
    latent channel, the mean and 1/deviation measured after training; empty means not measured yet.

    Raises ValueError for a shape that cannot be built.
    """

    in_channels: int = 1
    latent_channels: int = 4
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    res_blocks: int = 1
    attention: bool = False
    groups: int = 8
    codes: int = 0
    patch: int = 1
    latent_shift: tuple[float, ...] = ()
    latent_scale: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("in_channels", "latent_channels", "channels", "res_blocks", "groups", "patch"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 1 <= len(self.multipliers) <= 4 or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be 1 to 4 numbers of at least 1, not {self.multipliers}.")
        if any(self.channels * m % self.groups for m in self.multipliers):
            widths = [self.channels * m for m in self.multipliers]
            raise ValueError(f"every width must be a multiple of groups = {self.groups}, which {widths} are not.")
        if self.codes < 0 or self.codes == 1:
            raise ValueError(f"codes must be 0 (KL) or at least 2, not {self.codes}.")
        if not len(self.latent_shift) == len(self.latent_scale) in (0, self.latent_channels):
            raise ValueError(f"latent_shift and latent_scale must have {self.latent_channels} values each, or none.")

    @property
    def factor(self) -> int:
        """The compression factor f: an image (H, W) has latents (H/f, W/f)."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


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
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.in_channels * config.patch**2, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            blocks = [ResBlock(before if j == 0 else width, width, config.groups) for j in range(config.res_blocks)]
            last = i == len(widths) - 1
            self.levels.append(nn.Sequential(*blocks, *([] if last else [Downsample(width)])))
        self.middle = _middle(widths[-1], config)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)  # (B, C·p², H/p, W/p)
        h = self.conv_in(x)
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Latents (B, latent_channels, H/f, W/f) → images (B, in_channels, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = _middle(widths[0], config)
        self.levels = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            blocks = [ResBlock(before if j == 0 else width, width, config.groups) for j in range(config.res_blocks + 1)]
            last = i == len(widths) - 1
            self.levels.append(nn.Sequential(*blocks, *([] if last else [Upsample(width)])))
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels * config.patch**2, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.middle(self.conv_in(z))
        for level in self.levels:
            h = level(h)
        patches = self.conv_out(F.silu(self.norm_out(h)))  # (B, C·p², H/p, W/p)
        return rearrange(patches, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)


class Quantised(NamedTuple):
    """What a quantiser makes of latents (B, C, h, w): `z` of the same shape, `indices` (B, h, w), and a scalar loss."""

    z: torch.Tensor
    indices: torch.Tensor
    loss: torch.Tensor


class VectorQuantiser(nn.Module):
    """Replace each latent vector by the nearest of a number of codes (van den Oord et al., 2017, section 3).

    Backwards, the gradient passes straight through to the encoder. The loss is β · mean (z - sg[e])², the commitment of
    the encoder to its codes; the codes e follow the latents as a moving average in `update`, or, with `by_loss`, by the
    further term mean (sg[z] - e)². A code used less than `dead_below` times a batch is restarted by `update`.
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        beta: float = 0.25,
        by_loss: bool = False,
        decay: float = 0.99,
        dead_below: float = 0.5,
    ):
        super().__init__()
        self.beta, self.by_loss, self.decay, self.dead_below = beta, by_loss, decay, dead_below
        codebook = torch.randn(codes, dim)
        if by_loss:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.zeros(codes))  # uses a batch, as a moving average
        self.register_buffer("sums", torch.zeros(codes, dim))  # the latents that chose the code, summed, likewise

    @torch.no_grad()
    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """The index of the code at the smallest Euclidean distance to each vector of z (B, dim, h, w): (B, h, w)."""
        vectors = rearrange(z, "b c h w -> b (h w) c")
        distances = self.codebook.square().sum(1) - 2 * vectors @ self.codebook.T  # (B, hw, codes), without |z|²
        return rearrange(distances.argmin(2), "b (h w) -> b h w", h=z.shape[2])

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """The codes with these indices (B, h, w): (B, dim, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "b h w c -> b c h w")

    def forward(self, z: torch.Tensor) -> Quantised:
        """Quantise z (B, dim, h, w); the codebook itself stays as it is."""
        indices = self.nearest(z)
        code = self.lookup(indices)  # (B, dim, h, w)
        loss = self.beta * F.mse_loss(z, code.detach())
        if self.by_loss:
            loss = loss + F.mse_loss(code, z.detach())
        return Quantised(z + (code - z).detach(), indices, loss)

    @torch.no_grad()
    def update(self, z: torch.Tensor, indices: torch.Tensor, generator: torch.Generator) -> None:
        """Let the codebook follow a training batch z (B, dim, h, w) that was given the codes `indices` (B, h, w).

        N ← γN + (1-γ)n, m ← γm + (1-γ) Σz, e = m / N for each code (appendix A.1; not with `by_loss`). Codes that
        hardly anybody uses are then put on vectors of z drawn at random.
        """
        vectors, chosen = rearrange(z, "b c h w -> (b h w) c"), indices.flatten()
        uses = chosen.bincount(minlength=len(self.counts)).to(self.counts)
        self.counts.lerp_(uses, 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, chosen, vectors), 1 - self.decay)
        if not self.by_loss:
            mean = self.sums / self.counts.clamp(min=1e-6)[:, None]
            self.codebook.copy_(torch.where(self.counts[:, None] > 1e-6, mean, self.codebook))
        self._restart(self.counts < self.dead_below, vectors, generator)

    def _restart(self, dead: torch.Tensor, vectors: torch.Tensor, generator: torch.Generator) -> None:
        picks = torch.randint(len(vectors), (int(dead.sum()),), generator=generator).to(vectors.device)
        self.codebook[dead], self.sums[dead], self.counts[dead] = vectors[picks], vectors[picks], 1.0


def perplexity(indices: torch.Tensor, codes: int) -> torch.Tensor:
    """How many codes are used, evenly counted: exp(-Σ p log p) of their shares p in `indices` (any shape), a scalar.

    1 when only one code is used, `codes` when all are used equally often.
    """
    p = indices.flatten().bincount(minlength=codes) / indices.numel()
    return torch.special.entr(p).sum().exp()


class Autoencoder(nn.Module):
    """What both regularisations share: `latent` and `decode` work on raw latents, and `to_latents` and `from_latents`
    on those of the second stage, shifted and scaled to mean 0 and deviation 1 in each channel.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config

    @property
    def last_layer(self) -> torch.Tensor:
        """The weights of the decoder's last convolution, (in_channels · patch², channels · multipliers[0], 3, 3)."""
        return self.decoder.conv_out.weight

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] → the raw latents (B, latent_channels, H/f, W/f) for diffusion."""
        raise NotImplementedError

    def standardise(self, z: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, latent_channels, h, w) → (z - shift) · scale: mean 0 and deviation 1 in each channel.

        Raises ValueError before `set_latent_statistics` was called.
        """
        shift, scale = self._statistics(z)
        return (z - shift) * scale

    def to_latents(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] → standardised latents (B, latent_channels, H/f, W/f)."""
        return self.standardise(self.latent(x))

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

    def _check(self, x: torch.Tensor) -> None:
        f = self.config.factor
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % f or x.shape[3] % f:
            wanted = f"(B, {self.config.in_channels}, H, W) with H and W divisible by {f}"
            raise ValueError(f"images must be {wanted}, not {tuple(x.shape)}.")


class AutoencoderKL(Autoencoder):
    """The KL-regularised autoencoder (LDM section 3.1 and appendix G): `encode` gives the posterior."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        self.encoder = Encoder(config, 2 * config.latent_channels)
        self.to_moments = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.from_z = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: torch.Tensor) -> DiagonalGaussian:
        """q(z | x) for images x (B, in_channels, H, W) in [-1, 1]; its mean is (B, latent_channels, H/f, W/f).

        Raises ValueError when the number of channels is wrong or f does not divide the size.
        """
        self._check(x)
        return DiagonalGaussian(self.to_moments(self.encoder(x)))

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] → the posterior's mean (B, latent_channels, H/f, W/f)."""
        return self.encode(x).mean

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, latent_channels, h, w) → images (B, in_channels, f·h, f·w), about [-1, 1]."""
        return self.decoder(self.from_z(z))


class AutoencoderVQ(Autoencoder):
    """The VQ-regularised autoencoder (LDM section 3.1 and appendix G): the quantiser is the decoder's first layer.

    So `encode` gives latents before quantisation, which is what diffusion works on, and `decode` quantises.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        self.encoder = Encoder(config, config.latent_channels)
        self.to_codes = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.quantiser = VectorQuantiser(config.codes, config.latent_channels)
        self.from_z = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] → latents before quantisation (B, latent_channels, H/f, W/f).

        Raises ValueError when the number of channels is wrong or f does not divide the size.
        """
        self._check(x)
        return self.to_codes(self.encoder(x))

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """The same as `encode`."""
        return self.encode(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, latent_channels, h, w) → their codes → images (B, in_channels, f·h, f·w), about [-1, 1]."""
        return self.decoder(self.from_z(self.quantiser(z).z))


def make_autoencoder(config: AutoencoderConfig) -> AutoencoderKL | AutoencoderVQ:
    """The autoencoder that `config.codes` asks for."""
    return AutoencoderVQ(config) if config.codes else AutoencoderKL(config)
