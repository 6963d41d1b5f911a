"""Group norm (with or without SiLU) and layer norm that write stored codes, in Triton.

The layers behind them read bytes where they would have read 16 or 32-bit floats, and nothing float is written between.
Statistics are float32. Group norm takes three launches: the mean and the sum of squared deviations of every channel
over blocks of pixels, their merging over blocks and the group's channels (T. Chan et al., Updating formulae and a
pairwise algorithm for computing sample variances, 1979), and the normalising itself; the map is read twice. As each
block's deviations are from its own mean, nothing cancels, whatever the size of the map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdiff.deploy.kernels.codes import ActGrid
from qdiff.deploy.kernels.quantize import as_rows, set_of, spread, to_codes

BLOCK_PIXELS = 64  # pixels over which one program takes statistics
BLOCK_CHANNELS = 64
MERGE_TILE = 4096  # values that a program merges at a time
LAYER_NORM_TILE = 4096  # values that a program of a layer norm holds
MAX_LAYER_NORM = 16384


@triton.jit
def _moments(x_at, mean_at, spread_at, pixels, channels, x_stride, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Each channel's mean and sum of squared deviations over one block of one sample's pixels."""
    block, sample = tl.program_id(0), tl.program_id(2)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < pixels)[:, None] & (c < channels)[None, :]
    row = sample.to(tl.int64) * pixels + p
    x = tl.load(x_at + row[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - block * BLOCK_P, BLOCK_P).to(tl.float32)
    mean = tl.sum(x, 0) / count
    deviation = tl.where(mask, x - mean[None, :], 0.0)
    at = (sample.to(tl.int64) * tl.num_programs(0) + block) * channels + c
    tl.store(mean_at + at, mean, mask=c < channels)
    tl.store(spread_at + at, tl.sum(deviation * deviation, 0), mask=c < channels)


@triton.jit
def _merge(
    mean_at, spread_at, statistics_at, pixels, channels, groups, width, blocks, eps,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_G groups of one sample: their means and 1 / sqrt(variance + eps) from those of their channels' blocks."""
    sample = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    first = sample * blocks * channels + (group * width)[:, None, None]
    b, d = tl.arange(0, BLOCK_B)[None, :, None], tl.arange(0, BLOCK_D)[None, None, :]
    known = (group < groups)[:, None, None]
    size = 1.0 * width * pixels
    mean = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, blocks, BLOCK_B):
        count = tl.minimum(pixels - (start + b) * BLOCK_P, BLOCK_P).to(tl.float32)
        for channel in range(0, width, BLOCK_D):
            mask = known & (start + b < blocks) & (channel + d < width)
            at = first + (start + b) * channels + channel + d
            mean += tl.sum(tl.sum(count * tl.load(mean_at + at, mask=mask, other=0.0), 2), 1)
    mean = mean / size
    total = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, blocks, BLOCK_B):
        count = tl.minimum(pixels - (start + b) * BLOCK_P, BLOCK_P).to(tl.float32)
        for channel in range(0, width, BLOCK_D):
            mask = known & (start + b < blocks) & (channel + d < width)
            at = first + (start + b) * channels + channel + d
            away = tl.load(mean_at + at, mask=mask, other=0.0) - mean[:, None, None]
            within = tl.load(spread_at + at, mask=mask, other=0.0)
            total += tl.sum(tl.sum(tl.where(mask, within + count * away * away, 0.0), 2), 1)
    at = statistics_at + (sample * groups + group) * 2
    tl.store(at, mean, mask=group < groups)
    tl.store(at + 1, 1.0 / tl.sqrt_rn(total / size + eps), mask=group < groups)


@triton.jit
def _group_norm(
    x_at, out_at, statistics_at, weight_at, bias_at, scale_at, zero_at, sets_at,
    pixels, channels, width, groups, x_stride, samples_per_set, qmin, qmax,
    SILU: tl.constexpr, HAS_SETS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalise, scale and shift a tile of one sample, put it through SiLU if asked to, and write its codes."""
    sample = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < channels
    mask = (p < pixels)[:, None] & known[None, :]
    row = sample * pixels + p
    x = tl.load(x_at + row[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    of_group = statistics_at + (sample * groups + c // width) * 2
    mean = tl.load(of_group, mask=known, other=0.0)
    rstd = tl.load(of_group + 1, mask=known, other=0.0)
    weight = tl.load(weight_at + c, mask=known, other=0.0).to(tl.float32)
    bias = tl.load(bias_at + c, mask=known, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    chosen = set_of(sample, True, sets_at, samples_per_set, HAS_SETS)
    codes = to_codes(y, tl.load(scale_at + chosen), tl.load(zero_at + chosen).to(tl.float32), qmin, qmax)
    tl.store(out_at + row[:, None] * channels + c[None, :], codes.to(tl.int8), mask=mask)


@triton.jit
def _layer_norm(
    x_at, out_at, weight_at, bias_at, scale_at, zero_at, sets_at, rows, channels, x_stride, rows_per_set, qmin, qmax,
    eps, HAS_SETS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The codes of BLOCK_R normalised rows; a row fits a tile, so that it is read once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    valid, known = row < rows, c < channels
    mask = valid[:, None] & known[None, :]
    x = tl.load(x_at + row[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / channels
    deviation = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(deviation * deviation, 1) / channels + eps)
    weight = tl.load(weight_at + c, mask=known, other=0.0).to(tl.float32)
    bias = tl.load(bias_at + c, mask=known, other=0.0).to(tl.float32)
    y = deviation * rstd[:, None] * weight[None, :] + bias[None, :]
    chosen = set_of(row, valid, sets_at, rows_per_set, HAS_SETS)
    scale, zero = tl.load(scale_at + chosen)[:, None], tl.load(zero_at + chosen).to(tl.float32)[:, None]
    codes = to_codes(y, scale, zero, qmin, qmax)
    tl.store(out_at + row[:, None] * channels + c[None, :], codes.to(tl.int8), mask=mask)


def group_norm_codes(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, grid: ActGrid, sets: Tensor | None
) -> Tensor:
    """x: [N, ..., C], any float dtype; weight, bias: [C]. Returns the stored codes of its group norm, then SiLU if
    asked for; the same shape, int8, contiguous. sets: as for `quantize`."""
    samples, channels = x.shape[0], x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if not out.numel():
        return out
    x = as_rows(x)
    pixels = x.shape[0] // samples
    with torch.cuda.device_of(x):
        statistics = _statistics(x, samples, groups, eps)
        programs = (triton.cdiv(pixels, BLOCK_PIXELS), triton.cdiv(channels, BLOCK_CHANNELS), samples)
        _group_norm[programs](
            x, out, statistics, weight, bias, grid.scale, grid.zero, grid.zero if sets is None else sets,
            pixels, channels, channels // groups, groups, x.stride(0), spread(samples, sets),
            float(grid.qmin), float(grid.qmax), SILU=silu, HAS_SETS=sets is not None,
            BLOCK_P=BLOCK_PIXELS, BLOCK_C=BLOCK_CHANNELS,
        )  # fmt: skip
    return out


def _statistics(x: Tensor, samples: int, groups: int, eps: float) -> Tensor:
    """x: [N * pixels, C]. Returns [N, groups, 2]: mean and 1 / sqrt(variance + eps)."""
    rows, channels = x.shape
    pixels, width = rows // samples, channels // groups
    blocks = triton.cdiv(pixels, BLOCK_PIXELS)
    partial = torch.empty(2, samples, blocks, channels, device=x.device)
    programs = (blocks, triton.cdiv(channels, BLOCK_CHANNELS), samples)
    _moments[programs](
        x, partial[0], partial[1], pixels, channels, x.stride(0), BLOCK_P=BLOCK_PIXELS, BLOCK_C=BLOCK_CHANNELS
    )
    statistics = torch.empty(samples, groups, 2, device=x.device)
    block_b, block_d = (min(64, triton.next_power_of_2(size)) for size in (blocks, width))
    block_g = max(1, min(triton.next_power_of_2(groups), MERGE_TILE // (block_b * block_d)))
    _merge[(triton.cdiv(groups, block_g), samples)](
        partial[0], partial[1], statistics, pixels, channels, groups, width, blocks, eps,
        BLOCK_P=BLOCK_PIXELS, BLOCK_G=block_g, BLOCK_B=block_b, BLOCK_D=block_d,
    )  # fmt: skip
    return statistics


def layer_norm_codes(x: Tensor, weight: Tensor, bias: Tensor, eps: float, grid: ActGrid, sets: Tensor | None) -> Tensor:
    """x: [..., C], any float dtype; weight, bias: [C]. Returns the stored codes of its layer norm over the channels,
    int8, contiguous; sets: as for `quantize`. Raises ValueError for more channels than a program holds."""
    channels = x.shape[-1]
    if channels > MAX_LAYER_NORM:
        raise ValueError(f"layer norm: expected at most {MAX_LAYER_NORM} channels, found {channels}")
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if not out.numel():
        return out
    x = as_rows(x)
    block_c = triton.next_power_of_2(channels)
    block_r = max(1, min(16, LAYER_NORM_TILE // block_c))
    with torch.cuda.device_of(x):
        _layer_norm[(triton.cdiv(x.shape[0], block_r),)](
            x, out, weight, bias, grid.scale, grid.zero, grid.zero if sets is None else sets,
            x.shape[0], channels, x.stride(0), spread(x.shape[0], sets), float(grid.qmin), float(grid.qmax), eps,
            HAS_SETS=sets is not None, BLOCK_R=block_r, BLOCK_C=block_c,
        )  # fmt: skip
    return out
