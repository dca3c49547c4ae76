# Exported from notebooks/04_unet.ipynb by tools/export.py: edit the notebook, not this file.
"""The time-conditional UNet, from the toy size to Stable Diffusion's."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from minildm.autoencoder import Upsample


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Steps t (B,) → (B, dim): cosines, then sines, of t at dim/2 frequencies, dim even.

    The frequencies fall geometrically from 1 towards 1/10000 (Vaswani et al., 2017; DDPM, appendix B).
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


TAPS = torch.tensor([[4, 5, 7, 8], [3, 4, 6, 7], [1, 2, 4, 5], [0, 1, 3, 4]])  # a 3×3 kernel on a 2×2 map


class Conv(nn.Conv2d):
    """A 1×1 or 3×3 convolution that keeps the size: (B, in, H, W) → (B, out, H, W), as nn.Conv2d gives it.

    In the memory format channels_last, a 1×1 kernel on any map and a 3×3 kernel on a 2×2 map are one matrix product.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int):
        super().__init__(in_channels, out_channels, size, padding=size // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_contiguous(memory_format=torch.channels_last):
            rows = x.permute(0, 2, 3, 1)  # (B, H, W, in), as it lies in memory
            if self.kernel_size == (1, 1):
                return F.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
            if x.shape[2:] == (2, 2):
                y = F.linear(rows.flatten(1), self._full_matrix(), self.bias.repeat(4))  # (B, 4·out)
                return y.view(len(x), 2, 2, self.out_channels).permute(0, 3, 1, 2)
        return super().forward(x)

    def _full_matrix(self) -> torch.Tensor:
        """The weights from all four positions to all four, (4·out, 4·in): blocks (out, in) chosen by TAPS."""
        taps = self.weight.permute(2, 3, 0, 1).flatten(0, 1)  # (9, out, in)
        blocks = taps.index_select(0, TAPS.flatten().to(taps.device)).unflatten(0, (4, 4))  # (to, from, out, in)
        return blocks.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters to zero, so that the branch ending in this module starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class TimeResBlock(nn.Module):
    """Residual block that hears the time: x (B, in, H, W), embedding (B, E) → (B, out, H, W).

    The time is added to each channel in front of the second norm; with `scale_shift` it sets each channel's scale and
    shift behind it (Dhariwal and Nichol, 2021, section 3.1).
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, groups: int, scale_shift: bool = False):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = Conv(in_channels, out_channels, 3)
        self.scale_shift = scale_shift
        self.time = nn.Linear(time_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = zero_init(Conv(out_channels, out_channels, 3))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else Conv(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)  # (B, out, 1, 1) each
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        return self.shortcut(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Multi-head attention: x (B, N, dim) asks, context (B, M, context_dim) answers; without context x asks itself.

    softmax(Q Kᵀ / √d) V in each head (LDM section 3.3). `mask` (B, M) is True for tokens that may be read.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(x, "b n (heads d) -> b heads n d", heads=self.heads)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None):
        context = x if context is None else context
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(context)), self._split(self.to_v(context))
        mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, M)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, N, d)
        return self.to_out(rearrange(out, "b heads n d -> b n (heads d)"))

    def weights(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The attention map alone: the share of each token (M) in each answer (N), (B, heads, N, M)."""
        q, k = self._split(self.to_q(x)), self._split(self.to_k(context))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
        return scores.softmax(-1)


class FeedForward(nn.Module):
    """Two layers with a gated GELU between them (GEGLU; Shazeer, 2020): (B, N, dim) → (B, N, dim)."""

    def __init__(self, dim: int, multiplier: int = 4):
        super().__init__()
        self.to_gate = nn.Linear(dim, 2 * multiplier * dim)
        self.to_out = nn.Linear(multiplier * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.to_gate(x).chunk(2, dim=-1)
        return self.to_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, feed-forward; each behind a LayerNorm and added.

    x (B, N, dim) → the same. `mask` (B, M) hides padding: of the context (B, M, context_dim), or without one, of x.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None, ff_multiplier: int):
        super().__init__()
        self.norm1, self.self_attention = nn.LayerNorm(dim), Attention(dim, heads)
        if context_dim is not None:
            self.norm2, self.cross_attention = nn.LayerNorm(dim), Attention(dim, heads, context_dim)
        self.norm3, self.feed_forward = nn.LayerNorm(dim), FeedForward(dim, ff_multiplier)
        self.has_context = context_dim is not None

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None):
        x = x + self.self_attention(self.norm1(x), mask=None if self.has_context else mask)
        if self.has_context:
            x = x + self.cross_attention(self.norm2(x), context, mask)
        return x + self.feed_forward(self.norm3(x))


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet. Level i works on `channels · multipliers[i]` channels at 1/2^i of the size.

    `attention[i]` puts a transformer behind each residual block of level i; there is always one in the middle.
    `heads` is the number of heads in every level, unless `head_size` fixes the width of a head in its place;
    `context_dim` the width of the tokens that cross-attention reads (None: no cross-attention); `depth` the number of
    transformer blocks in each transformer; `ff_multiplier` the width of their feed-forward layer; `groups` those of
    GroupNorm. With `scale_shift` the time scales and shifts, as in TimeResBlock; with `pooled` the first token of the
    context is added to the time embedding, so that the residual blocks hear the prompt as well.
    Raises ValueError when the channels of a level cannot be split like this, or `pooled` has no context.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2)
    res_blocks: int = 1
    attention: tuple[bool, ...] = (False, True)
    heads: int = 4
    context_dim: int | None = None
    depth: int = 1
    ff_multiplier: int = 4
    groups: int = 32
    head_size: int | None = None
    scale_shift: bool = False
    pooled: bool = False

    def __post_init__(self):
        for name in ("in_channels", "out_channels", "channels", "res_blocks", "depth", "ff_multiplier", "groups"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be numbers of at least 1, not {self.multipliers}.")
        if len(self.attention) != len(self.multipliers):
            raise ValueError(f"attention {self.attention} must say yes or no for each of {self.multipliers}.")
        if self.pooled and self.context_dim is None:
            raise ValueError("pooled takes the first token of a context: give the UNet a context_dim.")
        part, heads = self.heads, f"{self.heads} heads"
        if self.head_size is not None:
            part, heads = self.head_size, f"heads of {self.head_size}"
        if part < 1:
            raise ValueError(f"a level cannot have {heads}.")
        for width in {self.channels * m for m in self.multipliers}:
            if width % self.groups or width % part:
                raise ValueError(f"{width} channels cannot be split into {self.groups} groups and {heads}.")

    def heads_of(self, width: int) -> int:
        """The number of heads of a transformer on `width` channels."""
        return self.heads if self.head_size is None else width // self.head_size


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, added to it: (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)
        self.proj_in = Conv(channels, channels, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, config.heads_of(channels), config.context_dim, config.ff_multiplier)
            for _ in range(config.depth)
        )
        self.proj_out = zero_init(Conv(channels, channels, 1))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.blocks:
            h = block(h, context, mask)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))


class Stage(nn.Module):
    """One residual block and, where the level has attention, one transformer: (B, in, H, W) → (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, attention: bool, config: UNetConfig):
        super().__init__()
        self.res = TimeResBlock(in_channels, out_channels, 4 * config.channels, config.groups, config.scale_shift)
        self.transformer = SpatialTransformer(out_channels, config) if attention else None

    def forward(
        self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        x = self.res(x, emb)
        return x if self.transformer is None else self.transformer(x, context, mask)


class UNet(nn.Module):
    """ε_θ(x_t, t, τ(y)): predicts the target for x (B, in_channels, H, W) at steps t (B,) (LDM eq. 3).

    `context` (B, M, context_dim) are the tokens of the prompt and `mask` (B, M) is True where there is a token.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = [config.channels * m for m in config.multipliers]
        self.time_mlp = nn.Sequential(
            nn.Linear(config.channels, 4 * config.channels),
            nn.SiLU(),
            nn.Linear(4 * config.channels, 4 * config.channels),
        )
        self.pooled = nn.Linear(config.context_dim, 4 * config.channels) if config.pooled else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down, self.downsample, self.up, self.upsample = (nn.ModuleList() for _ in range(4))
        skips, current = [widths[0]], widths[0]
        for width, attention in zip(widths, config.attention, strict=True):
            level = nn.ModuleList()
            for _ in range(config.res_blocks):
                level.append(Stage(current, width, attention, config))
                current = width
                skips.append(current)
            self.down.append(level)
            if len(self.down) < len(widths):
                self.downsample.append(nn.Conv2d(current, current, 3, stride=2, padding=1))
                skips.append(current)
        self.middle = nn.ModuleList([Stage(current, current, True, config), Stage(current, current, False, config)])
        for width, attention in zip(reversed(widths), reversed(config.attention), strict=True):
            level = nn.ModuleList()
            for _ in range(config.res_blocks + 1):
                level.append(Stage(current + skips.pop(), width, attention, config))
                current = width
            self.up.append(level)
            if len(self.up) < len(widths):
                self.upsample.append(Upsample(current))
        self.norm_out = nn.GroupNorm(config.groups, current)
        self.conv_out = zero_init(nn.Conv2d(current, config.out_channels, 3, padding=1))

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._check(x, context)
        emb = self.time_mlp(timestep_embedding(t, self.config.channels).to(x.dtype))  # (B, 4·channels)
        if self.pooled is not None:
            emb = emb + self.pooled(context[:, 0])
        h = self.conv_in(x)
        skips = [h]
        for i, level in enumerate(self.down):
            for stage in level:
                h = stage(h, emb, context, mask)
                skips.append(h)
            if i < len(self.downsample):
                h = self.downsample[i](h)  # half the size
                skips.append(h)
        for stage in self.middle:
            h = stage(h, emb, context, mask)
        for i, level in enumerate(self.up):
            for stage in level:
                h = torch.cat([h, skips.pop()], dim=1)  # rebound, so that the former h is freed
                h = stage(h, emb, context, mask)
            if i < len(self.upsample):
                h = self.upsample[i](h)  # twice the size
        return self.conv_out(F.silu(self.norm_out(h)))

    def _check(self, x: torch.Tensor, context: torch.Tensor | None) -> None:
        f = 2 ** (len(self.config.multipliers) - 1)
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(
                f"the input must be (B, {self.config.in_channels}, H, W) with H and W divisible by {f}, "
                f"not {tuple(x.shape)}."
            )
        width = self.config.context_dim
        if width is None and context is not None:
            raise ValueError("this UNet was built without a context_dim: leave the context out.")
        if width is not None and (context is None or context.shape[-1] != width):
            got = "none" if context is None else tuple(context.shape)
            raise ValueError(f"this UNet reads a context (B, M, {width}), not {got}.")
