"""Attention of integer codes in one kernel: codes x codes, softmax, its codes x codes of v, in Triton.

The softmax output is put on its grid as in the simulation, for which every row's maximum and sum must be known first:
the keys are walked twice, once for these, once more to recompute the scores, quantize and multiply. No score and no
probability ever leaves the chip. Zero points are handled as in `product`, through sums of codes over channels and over
keys. Codes of the softmax output of more than 8 bits are multiplied as two bytes, p = 256 h + l + 128 with both signed.

Arrays are [N, tokens, heads, channels]; v's codes [N, heads, channels, keys], since byte products want the inner
dimension contiguous on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qdiff.deploy.kernels.codes import ActGrid
from qdiff.deploy.kernels.quantize import channel_sums, quantize
from qdiff.deploy.kernels.tuning import INTERPRETED, Config, bucket, tuned

CONFIGS = (  # rows, keys, value channels
    Config(64, 64, 64, 4, 3),
    Config(128, 64, 64, 8, 3),
    Config(128, 128, 64, 8, 3),
    Config(128, 64, 128, 8, 3),
    Config(64, 128, 128, 4, 3),
    Config(64, 64, 128, 4, 2),
    Config(64, 64, 256, 8, 2),
    Config(32, 64, 256, 4, 2),
    Config(64, 32, 32, 4, 4),
)
INTERPRETED_CONFIG = Config(64, 64, 64)
ALIGNED = 16  # bytes of a vector load: rows of v's codes are padded to it
LOG2_E = 1.4426950408889634


@triton.jit
def _scores(
    q, q_sum, k_at, k_sum_at, start, keys, heads, channels, q_zero, k_zero, factor,
    HAS_Q_ZERO: tl.constexpr, HAS_K_ZERO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of rows with BLOCK_N keys from `start` on, float32; minus infinity where there is no key."""
    key, d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    there = key < keys
    k_tile = k_at + (key * (heads * channels))[None, :] + d[:, None]
    k = tl.load(k_tile, mask=there[None, :] & (d < channels)[:, None], other=0)
    products = tl.dot(q, k, out_dtype=tl.int32)
    if HAS_Q_ZERO:
        products -= q_zero * tl.load(k_sum_at + key * heads, mask=there, other=0)[None, :]
    if HAS_K_ZERO:
        products -= k_zero * (q_sum - channels * q_zero)[:, None]
    return tl.where(there[None, :], products.to(tl.float32) * factor, float("-inf"))


@triton.jit
def _weigh(acc, codes, v, WIDE: tl.constexpr):
    """(acc of high bytes, of low bytes) plus the products of softmax codes with those of v; one byte uses the first."""
    high, low = acc
    if WIDE:
        high = tl.dot((codes >> 8).to(tl.int8), v, high, out_dtype=tl.int32)
        low = tl.dot(((codes & 255) - 128).to(tl.int8), v, low, out_dtype=tl.int32)
    else:
        high = tl.dot(codes.to(tl.int8), v, high, out_dtype=tl.int32)
    return high, low


@triton.jit
def _attention(
    q_at, k_at, v_at, out_at, q_sum_at, k_sum_at, v_sum_at, sets_at,
    q_scale_at, q_zero_at, k_scale_at, k_zero_at, v_scale_at, v_zero_at, w_scale_at, w_zero_at,
    queries, keys, heads, channels, values, v_stride, samples_per_set, score_factor, w_lo, w_hi,
    HAS_SETS: tl.constexpr, HAS_Q_ZERO: tl.constexpr, HAS_K_ZERO: tl.constexpr, HAS_V_ZERO: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head, BLOCK_E channels of the values."""
    sample, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d, e = tl.arange(0, BLOCK_D), tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    valid = row < queries
    chosen = 0
    if HAS_SETS:
        chosen = tl.load(sets_at + sample // samples_per_set).to(tl.int32)
    q_zero, k_zero = tl.load(q_zero_at + chosen), tl.load(k_zero_at + chosen)
    v_zero, w_zero = tl.load(v_zero_at + chosen), tl.load(w_zero_at + chosen)
    w_scale = tl.load(w_scale_at + chosen)
    factor = tl.load(q_scale_at + chosen) * tl.load(k_scale_at + chosen) * score_factor

    q_row = (sample.to(tl.int64) * queries + row) * heads + head
    q = tl.load(
        q_at + q_row[:, None] * channels + d[None, :], mask=valid[:, None] & (d < channels)[None, :], other=0
    )  # fmt: skip
    q_sum = tl.zeros([BLOCK_M], tl.int32)
    if HAS_K_ZERO:
        q_sum = tl.load(q_sum_at + q_row, mask=valid, other=0)
    first_key = sample.to(tl.int64) * keys * heads + head
    k_at += first_key * channels
    k_sum_at += first_key

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        scores = _scores(
            q, q_sum, k_at, k_sum_at, start, keys, heads, channels, q_zero, k_zero, factor,
            HAS_Q_ZERO, HAS_K_ZERO, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(scores, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        highest = higher
    to_steps = 1.0 / (total * w_scale)

    value_row = tl.program_id(1).to(tl.int64) * values + e
    v_rows = v_at + value_row[None, :] * v_stride
    high, low = tl.zeros([BLOCK_M, BLOCK_E], tl.int32), tl.zeros([BLOCK_M, BLOCK_E], tl.int32)
    w_sum = tl.zeros([BLOCK_M], tl.int64)
    for start in range(0, keys, BLOCK_N):
        scores = _scores(
            q, q_sum, k_at, k_sum_at, start, keys, heads, channels, q_zero, k_zero, factor,
            HAS_Q_ZERO, HAS_K_ZERO, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        # Beyond 2**21 steps every grid clips, and below 2**23 adding 1.5 * 2**23 rounds to whole numbers, ties to even.
        steps = tl.minimum(tl.exp2(scores - highest[:, None]) * to_steps[:, None], 2097152.0)
        codes = (steps + 12582912.0) - 12582912.0 + w_zero.to(tl.float32)
        codes = tl.minimum(tl.maximum(codes, w_lo), w_hi).to(tl.int32)
        key = start + tl.arange(0, BLOCK_N)
        v = tl.load(v_rows + key[:, None], mask=(key < keys)[:, None] & (e < values)[None, :], other=0)
        high, low = _weigh((high, low), codes, v, WIDE)
        if HAS_V_ZERO:
            w_sum += tl.sum(tl.where((key < keys)[None, :], codes - w_zero, 0), 1).to(tl.int64)

    v_sum = tl.load(v_sum_at + value_row, mask=e < values, other=0)[None, :]
    if WIDE:
        sums = high.to(tl.int64) * 256 + low.to(tl.int64) + (128 - w_zero).to(tl.int64) * v_sum
    else:
        sums = high - w_zero * v_sum
    if HAS_V_ZERO:
        sums -= (v_zero * w_sum).to(sums.dtype)[:, None]
    y = sums.to(tl.float32) * (w_scale * tl.load(v_scale_at + chosen))
    out = out_at + q_row[:, None] * values + e[None, :]
    tl.store(out, y.to(out_at.dtype.element_ty), mask=valid[:, None] & (e < values)[None, :])


@dataclass(frozen=True)
class Grids:
    """The grids of an attention product's operands; w is the softmax output."""

    q: ActGrid
    k: ActGrid
    v: ActGrid
    w: ActGrid


def integer_attention(
    q: Tensor, k: Tensor, v: Tensor, grids: Grids, sets: Tensor | None, operand_scale: float, score_scale: float
) -> Tensor:
    """q: [N, heads, L, d]; k: [N, heads, S, d]; v: [N, heads, S, e], 16 or 32-bit float.

    softmax(score_scale (operand_scale q)(operand_scale k)^T) v with every operand on its grid. sets: as for
    `quantize`. Returns [N, heads, L, e] in q's dtype, tokens before heads in memory.
    """
    q_codes, q_sums = quantize(q.transpose(1, 2), grids.q, sets, operand_scale, sums=True)
    k_codes, k_sums = quantize(k.transpose(1, 2), grids.k, sets, operand_scale, sums=True)
    v_codes = quantize(v.transpose(1, 2), grids.v, sets).permute(0, 2, 3, 1)
    v_codes = F.pad(v_codes, (0, -v_codes.shape[-1] % ALIGNED)).contiguous()
    v_sums = channel_sums(v_codes)
    samples, queries, heads, channels = q_codes.shape
    keys, values = k_codes.shape[1], v_codes.shape[2]
    out = torch.empty(samples, queries, heads, values, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out.transpose(1, 2)
    tables = [t for grid in (grids.q, grids.k, grids.v, grids.w) for t in (grid.scale, grid.zero)]
    arguments = [
        q_codes, k_codes, v_codes, out, q_sums, k_sums, v_sums, grids.q.zero if sets is None else sets, *tables,
        queries, keys, heads, channels, values, v_codes.shape[-1], 1 if sets is None else samples // len(sets),
        score_scale * LOG2_E, float(grids.w.qmin), float(grids.w.qmax),
    ]  # fmt: skip
    flags = {
        "HAS_SETS": sets is not None, "HAS_Q_ZERO": not grids.q.centred, "HAS_K_ZERO": not grids.k.centred,
        "HAS_V_ZERO": not grids.v.centred, "WIDE": grids.w.bits > 8,
        "BLOCK_D": max(32, triton.next_power_of_2(channels)),
    }  # fmt: skip

    def launch(config: Config) -> None:
        programs = triton.cdiv(queries, config.block_m), samples * heads, triton.cdiv(values, config.block_k)
        _attention[programs](
            *arguments, **flags, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_E=config.block_k,
            **config.options,
        )  # fmt: skip

    shape = (bucket(samples * heads), queries, keys, channels, values, flags["WIDE"], q.dtype)
    tuned("attention", shape, (INTERPRETED_CONFIG,) if INTERPRETED else CONFIGS, launch, q_codes)
    return out.transpose(1, 2)
