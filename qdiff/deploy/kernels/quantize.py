"""Float activations to stored codes (signed bytes), and sums of codes over channels, in Triton.

The arithmetic is `qdiff.nn.grid.Grid.codes`'s in float32: a true division, rounding to nearest with ties to even.
Arrays have their channels last; a row is what lies at one pixel, or one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdiff.deploy.kernels.codes import ActGrid

TILE = 4096  # values that a program holds at a time
MAX_WIDTH = 256  # channels of a tile
FAR = tl.constexpr(2097152.0)  # ratios beyond it are clipped whatever they round to
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds a smaller float32 to whole numbers, ties to even


@triton.jit
def to_codes(x, scale, zero, qmin, qmax):
    """Stored codes of float32 values, as int32; scale, zero (float32) broadcastable to x."""
    ratio = tl.minimum(tl.maximum(tl.div_rn(x, scale), -FAR), FAR)
    return tl.minimum(tl.maximum((ratio + MAGIC) - MAGIC + zero, qmin), qmax).to(tl.int32)


@triton.jit
def set_of(row, valid, sets_at, rows_per_set, HAS_SETS: tl.constexpr):
    """The parameter set of each row."""
    if HAS_SETS:
        chosen = tl.load(sets_at + row // rows_per_set, mask=valid, other=0).to(tl.int32)
    else:
        chosen = row * 0
    return chosen


@triton.jit
def _quantize(
    x_at, out_at, sums_at, scale_at, zero_at, sets_at, rows, channels, x_stride, rows_per_set, qmin, qmax, factor,
    HAS_SETS: tl.constexpr, HAS_SUMS: tl.constexpr, FROM_CODES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows: their codes, their codes' sums over the channels, or both. FROM_CODES: x holds codes already."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = row < rows
    total = tl.zeros([BLOCK_R], tl.int32)
    chosen = set_of(row, valid, sets_at, rows_per_set, HAS_SETS)
    scale = tl.load(scale_at + chosen)[:, None]
    zero = tl.load(zero_at + chosen).to(tl.float32)[:, None]
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (c < channels)[None, :]
        x = tl.load(x_at + row[:, None] * x_stride + c[None, :], mask=mask, other=0)
        if FROM_CODES:
            codes = x.to(tl.int32)
        else:
            codes = to_codes(x.to(tl.float32) * factor, scale, zero, qmin, qmax)
            tl.store(out_at + row[:, None] * channels + c[None, :], codes.to(tl.int8), mask=mask)
        if HAS_SUMS:
            total += tl.sum(tl.where(mask, codes, 0), 1)
    if HAS_SUMS:
        tl.store(sums_at + row, total, mask=valid)


def quantize(
    x: Tensor, grid: ActGrid, sets: Tensor | None, factor: float = 1.0, sums: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """x: [..., C], 16 or 32-bit float, of `factor` times which the codes are wanted.

    sets: the parameter set of each sample [N], of all [1], or None for the first; samples are the first axis. Returns
    the stored codes int8, contiguous; with `sums` also their sums over the channels, [...] int32. Raises ValueError for
    codes of more than 8 bits.
    """
    if grid.bits > 8:
        raise ValueError(f"stored codes: expected at most 8 bits, found {grid.bits}")
    rows_of, channels = as_rows(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    total = torch.empty(x.shape[:-1], dtype=torch.int32, device=x.device) if sums else None
    _launch(rows_of, channels, grid, sets, factor, out, total)
    return (out, total) if sums else out


def channel_sums(codes: Tensor) -> Tensor:
    """codes: [..., C] int8. Returns [...] int32."""
    total = torch.empty(codes.shape[:-1], dtype=torch.int32, device=codes.device)
    _launch(as_rows(codes), codes.shape[-1], None, None, 1.0, None, total)
    return total


def _launch(
    x: Tensor, channels: int, grid: ActGrid | None, sets: Tensor | None, factor: float, out: Tensor | None,
    total: Tensor | None,
) -> None:  # fmt: skip
    rows = x.shape[0]
    if not rows:
        return
    block_r, block_c = row_tile(channels)
    dummy = torch.zeros(1, dtype=torch.int32, device=x.device) if grid is None else grid.zero
    tensors = (x, out, total, grid and grid.scale, grid and grid.zero, sets)
    ends = (0.0, 0.0) if grid is None else (float(grid.qmin), float(grid.qmax))
    with torch.cuda.device_of(x):
        _quantize[(triton.cdiv(rows, block_r),)](
            *(dummy if t is None else t for t in tensors), rows, channels, x.stride(0), spread(rows, sets),
            *ends, factor, HAS_SETS=sets is not None, HAS_SUMS=total is not None, FROM_CODES=grid is None,
            BLOCK_R=block_r, BLOCK_C=block_c,
        )  # fmt: skip


def row_tile(channels: int) -> tuple[int, int]:
    """(rows, channels) of a program's tile."""
    width = min(MAX_WIDTH, triton.next_power_of_2(channels))
    return max(1, min(64, TILE // width)), width


def as_rows(x: Tensor) -> Tensor:
    """x: [..., C]. Returns [rows, C] whose channels lie next to each other, a view where x's memory allows one."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(-1, x.shape[-1])


def spread(rows: int, sets: Tensor | None) -> int:
    """Rows that share an entry of `sets`. Raises ValueError where they do not divide."""
    entries = 1 if sets is None else len(sets)
    if rows % entries:
        raise ValueError(f"parameter sets: expected as many as samples, found {entries} for {rows} rows")
    return max(1, rows // entries)
