"""Convolutions and linear layers as one matrix product whose left side is read in place (implicit GEMM), in Triton.

Activations are [N, H, W, C] arrays, weights [O, kh, kw, C] (`codes.KernelWeight`). Row m of the product is an output
pixel, column o an output channel, and the inner dimension runs over (tap, channel). Everything that zero points ask
for happens once per output tile, after the loop, with a' the stored activation codes, w' the stored weight codes:

    sum (w' - z_w)(a' - z_a) = sum w' a'  -  z_w sum a'  -  z_a sum (w' - z_w),

all sums over the taps inside the image. The loop thus multiplies bytes and nothing else: padding is loaded as 0, sum a'
comes from sums over each pixel's channels (`quantize.channel_sums`), the last sum from `geometry.windows`. int32 wraps
around, so intermediate sums may exceed it; the result may not (`codes.MAX_DEPTH`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdiff.deploy.kernels.codes import ActGrid, KernelWeight
from qdiff.deploy.kernels.geometry import Geometry, Windows, windows
from qdiff.deploy.kernels.quantize import as_rows, channel_sums, spread
from qdiff.deploy.kernels.tuning import INTERPRETED, Config, bucket, fitting, tuned

GROUP_ROWS = 8  # tiles of rows that share the columns' weights in the L2 cache
# The first one is what runs where nothing can be timed. Inner tiles are bytes: 32 is the least a byte product takes.
INTEGER_CONFIGS = (
    Config(128, 128, 64, 8, 4),
    Config(128, 128, 128, 8, 3),
    Config(128, 256, 128, 8, 3),
    Config(128, 64, 128, 4, 4),
    Config(64, 128, 128, 4, 4),
    Config(64, 64, 128, 4, 4),
    Config(64, 64, 64, 4, 5),
    Config(32, 64, 128, 4, 5),
    Config(128, 32, 64, 4, 4),
    Config(16, 64, 128, 4, 5),
    Config(16, 16, 128, 4, 4),
)
FLOAT_CONFIGS = (
    Config(128, 128, 32, 8, 4),
    Config(128, 128, 64, 8, 3),
    Config(128, 256, 32, 8, 3),
    Config(64, 128, 64, 4, 4),
    Config(64, 64, 64, 4, 4),
    Config(128, 64, 64, 4, 3),
    Config(128, 32, 32, 4, 4),
    Config(16, 64, 128, 4, 4),
    Config(16, 16, 128, 4, 4),
)
INTERPRETED_CONFIG = Config(128, 64, 64)


@triton.jit
def _tile(rows, outputs, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's row and column tile; programs that run together share weights and activations in the cache."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program - group * (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def _tap(tap, top, left, valid, height, width, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr):
    """Which rows see an activation at that tap, and its distance in pixels from the window's corner."""
    down, right = (tap // KW) * DH, (tap % KW) * DW
    y, x = top + down, left + right
    return valid & (y >= 0) & (y < height) & (x >= 0) & (x < width), down * width + right


@triton.jit
def _multiply(acc, a, codes, zero, FLOAT: tl.constexpr, HAS_ZERO: tl.constexpr):
    """acc + a x codes; in float the weights are centred first, exactly: 16 bits hold every whole number up to 256."""
    if FLOAT:
        weights = codes.to(tl.float32)
        if HAS_ZERO:
            weights -= zero[None, :]
        acc = tl.dot(a, weights.to(a.dtype), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, codes.to(tl.int8), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _accumulate(
    acc, a_at, w_at, zero, corner, top, left, valid, columns,
    height, width, outputs, channels, depth, a_stride,
    TAPS: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    NIBBLES: tl.constexpr, FLOAT: tl.constexpr, HAS_ZERO: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile's sums over (tap, channel). depth: stored weights of a tap, half the channels where bytes hold two.

    One loop over all blocks of all taps, so that loads are pipelined across taps; only scalars are divided in it.
    """
    k = tl.arange(0, BLOCK_K)
    a_rows = a_at + corner.to(tl.int64)[:, None] * a_stride + k[None, :]
    w_columns = w_at + columns.to(tl.int64)[None, :] * (TAPS * depth) + k[:, None]
    wanted = (columns < outputs)[None, :]
    blocks = tl.cdiv(depth, BLOCK_K)
    for step in range(TAPS * blocks):
        tap = step // blocks
        start = (step - tap * blocks) * BLOCK_K
        inside, distance = _tap(tap, top, left, valid, height, width, KW, DH, DW)
        a_block = a_rows + (distance * a_stride + start)
        if EVEN:
            codes = tl.load(w_columns + (tap * depth + start), mask=wanted, other=0)
            a = tl.load(a_block, mask=inside[:, None], other=0)
        else:
            there = start + k < depth
            codes = tl.load(w_columns + (tap * depth + start), mask=wanted & there[:, None], other=0)
            a = tl.load(a_block, mask=inside[:, None] & there[None, :], other=0)
        if NIBBLES:
            second = inside[:, None] & (start + k < channels - depth)[None, :]
            a_second = tl.load(a_block + depth, mask=second, other=0)
            acc = _multiply(acc, a, codes & 15, zero, FLOAT, HAS_ZERO)
            acc = _multiply(acc, a_second, codes >> 4, zero, FLOAT, HAS_ZERO)
        else:
            acc = _multiply(acc, a, codes, zero, FLOAT, HAS_ZERO)
    return acc


@triton.jit
def _product(
    a_at, w_at, out_at, scale_at, zero_at, sets_at, w_scale_at, w_zero_at,
    sums_at, classes_at, windows_at, bias_at, other_at,
    rows, rows_per_set, height, width, out_width, pixels, outputs, channels, depth, a_stride,
    other_sample, other_pixel, other_channel,
    TAPS: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, NIBBLES: tl.constexpr, FLOAT: tl.constexpr, RAW: tl.constexpr,
    HAS_SETS: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_WINDOWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_OTHER: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of the output [N * OH * OW, O]; see the module's text for the sums."""
    tile_m, tile_n = _tile(rows, outputs, GROUP, BLOCK_M, BLOCK_N)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    valid, wanted = row < rows, columns < outputs
    sample, pixel = row // pixels, row % pixels
    top, left = (pixel // out_width) * SH - PH, (pixel % out_width) * SW - PW
    corner = (sample * height + top) * width + left
    w_zero = tl.zeros([BLOCK_N], tl.int32)
    if HAS_ZERO:
        w_zero = tl.load(w_zero_at + columns, mask=wanted, other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32 if FLOAT else tl.int32)
    acc = _accumulate(
        acc, a_at, w_at, w_zero.to(tl.float32), corner, top, left, valid, columns,
        height, width, outputs, channels, depth, a_stride,
        TAPS, KW, DH, DW, NIBBLES, FLOAT, HAS_ZERO, EVEN, BLOCK_K,
    )  # fmt: skip
    chosen = tl.zeros([BLOCK_M], tl.int32)
    if HAS_SETS:
        chosen = tl.load(sets_at + row // rows_per_set, mask=valid, other=0).to(tl.int32)
    if HAS_ZERO and not FLOAT:
        total = tl.zeros([BLOCK_M], tl.int32)
        for tap in range(TAPS):
            inside, distance = _tap(tap, top, left, valid, height, width, KW, DH, DW)
            total += tl.load(sums_at + corner + distance, mask=inside, other=0)
        acc -= total[:, None] * w_zero[None, :]
    if HAS_WINDOWS:
        kind = tl.load(classes_at + pixel, mask=valid, other=0)
        seen = tl.load(windows_at + kind[:, None] * outputs + columns[None, :], mask=wanted[None, :], other=0)
        acc -= tl.load(zero_at + chosen)[:, None] * seen
    out = out_at + row.to(tl.int64)[:, None] * outputs + columns[None, :]
    kept = valid[:, None] & wanted[None, :]
    if RAW:
        tl.store(out, acc, mask=kept)
    else:
        scale = tl.load(w_scale_at + columns, mask=wanted, other=0.0)[None, :]
        if not FLOAT:
            scale = tl.load(scale_at + chosen)[:, None] * scale
        y = acc.to(tl.float32) * scale
        if HAS_BIAS:
            y += tl.load(bias_at + columns, mask=wanted, other=0.0)[None, :]
        if HAS_OTHER:
            at = sample.to(tl.int64) * other_sample + pixel.to(tl.int64) * other_pixel
            at = at[:, None] + columns[None, :] * other_channel
            y += tl.load(other_at + at, mask=kept, other=0.0).to(tl.float32)
        tl.store(out, y.to(out_at.dtype.element_ty), mask=kept)


@dataclass(frozen=True)
class Epilogue:
    """What a product does with its sums: y = sums * scales + bias + other, written in `dtype`.

    bias: [O] float32; other: [N, OH, OW, O] or broadcastable to it, any float dtype.
    """

    dtype: torch.dtype
    bias: Tensor | None = None
    other: Tensor | None = None


def integer_product(
    codes: Tensor, weight: KernelWeight, grid: ActGrid, sets: Tensor | None, geometry: Geometry, epilogue: Epilogue,
    seen: Windows | None = None, sums: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A convolution of stored activation codes [N, H, W, C] int8 (channels next to each other).

    sets: the parameter set of each sample [N], of all [1], or None for the first. seen: the weight's `windows` for
    this image, sums: the codes' sums over channels [N, H, W] int32, where they are at hand. Returns [N, OH, OW, O] in
    the epilogue's dtype.
    """
    return _run(codes, weight, geometry, epilogue, grid, sets, seen, sums)


def integer_sums(codes: Tensor, weight: KernelWeight, grid: ActGrid, sets: Tensor | None, geometry: Geometry) -> Tensor:
    """The sums of (q_w - z_w)(q_a - z_a) alone, [N, OH, OW, O] int32; arguments as for `integer_product`."""
    return _run(codes, weight, geometry, Epilogue(torch.int32), grid, sets)


def weight_only_product(x: Tensor, weight: KernelWeight, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """A convolution of float activations [N, H, W, C], 16 or 32 bit, with weights made of their codes on the way.

    Returns [N, OH, OW, O] in the epilogue's dtype.
    """
    return _run(x, weight, geometry, epilogue)


def _run(
    x: Tensor, weight: KernelWeight, geometry: Geometry, epilogue: Epilogue,
    grid: ActGrid | None = None, sets: Tensor | None = None, seen: Windows | None = None,
    sums: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Either product; one of float activations has no grid."""
    samples, height, width, channels = x.shape
    if channels != weight.channels:
        raise ValueError(f"product: the weight takes {weight.channels} channels, found {channels}")
    x_rows = as_rows(x)
    out_height, out_width = geometry.size(weight.kernel_size, (height, width))
    out = torch.empty(samples, out_height, out_width, weight.outputs, dtype=epilogue.dtype, device=x.device)
    if not out.numel():
        return out
    float_, raw = grid is None, epilogue.dtype == torch.int32
    if float_ or grid.centred:
        seen = None
    elif seen is None:
        seen = windows(weight, geometry, (height, width))
    if not float_ and weight.zero is not None and sums is None:
        sums = channel_sums(x_rows)
    other = None if epilogue.other is None else _other(epilogue.other, out)
    rows, (kh, kw) = out.numel() // weight.outputs, weight.kernel_size
    depth = weight.codes.shape[-1]
    dummy = weight.scale  # stands for tensors that a kernel without them never reads
    tensors = [
        x_rows, weight.codes, out, grid and grid.scale, grid and grid.zero, sets, weight.scale, weight.zero,
        sums, seen and seen.classes, seen and seen.sums, epilogue.bias, other,
    ]  # fmt: skip
    sizes = [
        rows, spread(rows, sets), height, width, out_width, out_height * out_width, weight.outputs, channels, depth,
        x_rows.stride(0), *_strides(other),
    ]  # fmt: skip
    flags = _geometry_flags(weight, geometry) | {
        "FLOAT": float_, "RAW": raw, "HAS_SETS": sets is not None, "HAS_WINDOWS": seen is not None,
        "HAS_BIAS": epilogue.bias is not None, "HAS_OTHER": other is not None,
    }  # fmt: skip

    def launch(config: Config) -> None:
        programs = triton.cdiv(rows, config.block_m) * triton.cdiv(weight.outputs, config.block_n)
        _product[(programs,)](
            *(dummy if t is None else t for t in tensors), *sizes, **flags, EVEN=depth % config.block_k == 0,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, **config.options,
        )  # fmt: skip

    configs = fitting(FLOAT_CONFIGS if float_ else INTEGER_CONFIGS, rows, weight.outputs)
    shape = (bucket(rows), channels, weight.outputs, kh, kw, *geometry.stride, weight.nibbles, x.dtype, epilogue.dtype)
    tuned("product", shape, [INTERPRETED_CONFIG] if INTERPRETED else configs, launch, x)
    return out


def _geometry_flags(weight: KernelWeight, geometry: Geometry) -> dict[str, int | bool]:
    """Compile-time constants that are the layer's, whatever runs through it."""
    kh, kw = weight.kernel_size
    return {
        "TAPS": kh * kw, "KW": kw, "SH": geometry.stride[0], "SW": geometry.stride[1],
        "PH": geometry.padding[0], "PW": geometry.padding[1], "DH": geometry.dilation[0], "DW": geometry.dilation[1],
        "NIBBLES": weight.nibbles, "HAS_ZERO": weight.zero is not None, "GROUP": GROUP_ROWS,
    }  # fmt: skip


def _other(other: Tensor, out: Tensor) -> Tensor:
    """What is added, expanded to the output as [N, OH * OW, O] without copying what is broadcast."""
    return other.expand(out.shape).flatten(1, 2)


def _strides(other: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if other is None else other.stride()
