"""Building blocks of the DDPM U-Net (arXiv 2006.11239, appendix B), under the names of the published checkpoints."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.attention import DotProductAttention

NORM_GROUPS, NORM_EPS = 32, 1e-6
MAX_PERIOD = 10000  # longest wavelength of the time embedding, in units of 2π timesteps


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal features of the timestep (arXiv 1706.03762 §3.5), sines first.

    t: [N], integer or float. Returns [N, dim] in `dtype`; dim is even.
    Computed in float64 for float64 networks, else in float32: half precision cannot hold the angles.
    """
    assert dim % 2 == 0 and dim > 2, dim
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    half = dim // 2
    exponent = torch.arange(half, dtype=compute, device=t.device) * (-math.log(MAX_PERIOD) / (half - 1))
    angles = t.to(compute)[:, None] * exponent.exp()[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class GroupNormSiLU(nn.GroupNorm):
    """Group norm and SiLU as one module, so that one kernel can take the place of both."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


def group_norm_silu(channels: int) -> GroupNormSiLU:
    return GroupNormSiLU(NORM_GROUPS, channels, eps=NORM_EPS)


def plus(layer: nn.Module, x: Tensor, make_other: Callable[[], Tensor]) -> Tensor:
    """make_other() + layer(x); the other is of the output's shape or broadcast to it.

    A layer with a `forward_plus(x, other)` of its own adds while it writes its output; for others the layer runs first.
    """
    if (fused := getattr(layer, "forward_plus", None)) is not None:
        return fused(x, make_other())
    out = layer(x)
    return make_other() + out  # a sum is laid out in memory as its first term is: features stay as they were


class ResnetBlock(nn.Module):
    """Two 3×3 convolutions with the time embedding between them, around a shortcut.

    `temb_channels` is None in a network without time, which has no projection of it. In the up path the input is
    concat([features, skip]) with `in_channels` and `skip_channels` channels; `shortcut_boundary` is then the number
    of feature channels, and None elsewhere.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int | None,
        dropout: float,
        conv_shortcut: bool,
        skip_channels: int = 0,
    ):
        super().__init__()
        joined = in_channels + skip_channels
        self.shortcut_boundary: int | None = in_channels if skip_channels else None
        self.norm1 = group_norm_silu(joined)
        self.conv1 = nn.Conv2d(joined, out_channels, 3, padding=1)
        self.temb_proj = None if temb_channels is None else nn.Linear(temb_channels, out_channels)
        self.norm2 = group_norm_silu(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut_name: str | None = None
        if joined != out_channels and conv_shortcut:
            self.shortcut_name = "conv_shortcut"
            self.conv_shortcut = nn.Conv2d(joined, out_channels, 3, padding=1)
        elif joined != out_channels:
            self.shortcut_name = "nin_shortcut"
            self.nin_shortcut = nn.Conv2d(joined, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x: [N, in_channels + skip_channels, H, W]; temb: [N, temb_channels], or None as the
        constructor's. Returns [N, out_channels, H, W].
        """
        normed = self.norm1(x)
        if self.temb_proj is None:
            h = self.conv1(normed)
        else:
            h = plus(self.conv1, normed, lambda: self.temb_proj(F.silu(temb))[:, :, None, None])
        shortcut = nn.Identity() if self.shortcut_name is None else getattr(self, self.shortcut_name)
        return plus(self.conv2, self.dropout(self.norm2(h)), lambda: shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention over pixels: one head as wide as the features, scores scaled by C^-1/2."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.attention = DotProductAttention(score_scale=channels**-0.5)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]. Returns the same shape."""
        normed = self.norm(x)
        q, k, v = (_tokens(projection(normed)) for projection in (self.q, self.k, self.v))
        attended = self.attention(q, k, v)
        return plus(self.proj_out, attended.squeeze(1).transpose(1, 2).reshape(x.shape), lambda: x)


def _tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, 1, H·W, C]: the fused attention kernels ask for an axis of heads."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)


class Downsample(nn.Module):
    """Halves the resolution: 3×3 with stride 2, or 2×2 average pooling where `with_conv` is false."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]. Returns [N, C, H/2, W/2]."""
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one column right, one row below


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then 3×3 where `with_conv` is true."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]. Returns [N, C, 2H, 2W]."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)
