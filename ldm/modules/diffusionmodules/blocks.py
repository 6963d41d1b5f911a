"""Building blocks of latent U-Nets (arXiv 2105.05233 and 2112.10752), with the published parameter names."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.attention import DotProductAttention
from ddim.layers import MAX_PERIOD, plus
from ldm.modules.attention import zeroed

NORM_GROUPS, NORM_EPS = 32, 1e-5


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal features of the timestep (arXiv 1706.03762 §3.5), cosines first.

    t: [N], integer or float. Returns [N, dim] in `dtype`; an odd dim ends with a zero.
    Computed in float64 for float64 networks, else in float32: half precision cannot hold the angles.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    half = dim // 2
    exponent = torch.arange(half, dtype=compute, device=t.device) * (-math.log(MAX_PERIOD) / half)
    angles = t.to(compute)[:, None] * exponent.exp()[None, :]
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(features, (0, dim - 2 * half)).to(dtype)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class Downsample(nn.Module):
    """Halves the resolution: 3×3 with stride 2 and padding 1, or 2×2 average pooling where `use_conv` is false."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]. Returns [N, C, H/2, W/2]."""
        return self.op(x)


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then 3×3 where `use_conv` is true."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]. Returns [N, C, 2H, 2W]."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class ResBlock(nn.Module):
    """Two 3×3 convolutions with the time embedding between them, around a shortcut; may also change the resolution.

    In the up path the input is concat([features, skip]) with `channels` and `skip_channels` channels;
    `shortcut_boundary` is then the number of feature channels, and None elsewhere.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        skip_channels: int = 0,
        use_scale_shift_norm: bool = False,  # the embedding scales and shifts the norm's output (arXiv 2105.05233 §4.3)
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        joined = channels + skip_channels
        self.shortcut_boundary: int | None = channels if skip_channels else None
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(group_norm(joined), nn.SiLU(), nn.Conv2d(joined, out_channels, 3, padding=1))
        self.resample = Upsample(joined, False) if up else Downsample(joined, False) if down else nn.Identity()
        emb_out = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        last = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.out_layers = nn.Sequential(group_norm(out_channels), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if joined == out_channels else nn.Conv2d(joined, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [N, channels + skip_channels, H, W]; emb: [N, emb_channels]. Returns [N, out_channels, H', W']."""
        norm, activation, conv = self.in_layers
        h = self.resample(activation(norm(x)))
        norm, activation, dropout, last = self.out_layers
        if self.use_scale_shift_norm:
            h = norm(conv(h))
            scale, shift = self._embedded(emb).chunk(2, dim=1)
            h = h * (1 + scale) + shift
        else:
            h = norm(plus(conv, h, lambda: self._embedded(emb)))
        return plus(last, dropout(activation(h)), lambda: self.skip_connection(self.resample(x)))

    def _embedded(self, emb: Tensor) -> Tensor:
        return self.emb_layers(emb)[:, :, None, None]


class AttentionBlock(nn.Module):
    """Self-attention over pixels; queries and keys are each scaled by d^-1/4, d the channels of a head.

    One convolution makes queries, keys and values. Published checkpoints split its output into heads first
    (`new_order` false), so that its channels run over (head, q/k/v, d) and not over (q/k/v, head, d).
    """

    def __init__(self, channels: int, num_heads: int, new_order: bool = False):
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = DotProductAttention(operand_scale=(channels // num_heads) ** -0.25)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]. Returns the same shape."""
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat)).transpose(1, 2)
        if self.new_order:
            q, k, v = (_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        else:
            q, k, v = _heads(qkv, self.num_heads).chunk(3, dim=-1)
        attended = self.attention(q, k, v).transpose(2, 3).flatten(1, 2)
        return plus(self.proj_out, attended, lambda: flat).view_as(x)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[N, L, heads·d] -> [N, heads, L, d]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
