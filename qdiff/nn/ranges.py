"""Range finders: small callables from values to a range (low, high), and the one function from a range to a grid.

A finder takes values [R, K], one row per scale, and returns (low [R], high [R]).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qdiff.nn.grid import MIN_SCALE, Grid
from qdiff.recipes.recipe import QuantSpec
from qdiff.recipes.stages import RANGE_FINDERS, RangeSpec

CHUNK = 2**23  # values quantized at once in a search: 32 MiB of float32
CPU_CHUNK = 2**18  # the same on a CPU, whose cache then holds them: half the time


def grid_from_range(low: Tensor, high: Tensor, spec: QuantSpec, raw_min: bool = False) -> Grid:
    """low, high: [R], same shape. Returns the grids of `spec` over those ranges, scale and zero point [R].

    Zero is always a grid point, so the range is widened to hold it. `raw_min` reproduces a fault of the published
    min-max (B1): the scale keeps the raw ends while the zero point uses min(low, 0) and may lie beyond the codes, so
    that strictly positive data collapse and strictly negative data do not.
    """
    levels = 2**spec.bits - 1
    if spec.kind == "signed":
        scale = torch.maximum(low.abs(), high.abs()) / (2 ** (spec.bits - 1) - 1)
        return Grid(scale.clamp_min(MIN_SCALE), torch.zeros_like(scale), spec)
    if spec.kind == "unsigned":
        scale = (high / levels).clamp_min(MIN_SCALE)
        return Grid(scale, torch.zeros_like(scale), spec)
    if spec.kind == "unsigned_mid":
        return _mid_grid(low, high, spec)
    zero_low, zero_high = low.clamp_max(0), high.clamp_min(0)
    span = high - low if raw_min else zero_high - zero_low
    scale = (span / levels).clamp_min(MIN_SCALE)
    zero_point = torch.round(-zero_low / scale)
    return Grid(scale, zero_point if raw_min else zero_point.clamp(spec.qmin, spec.qmax), spec)


def _mid_grid(low: Tensor, high: Tensor, spec: QuantSpec) -> Grid:
    """EDA-DM's grid: [-theta, theta] around code 2^(b-1), or one-sided when the whole tensor is (methods §2.1)."""
    levels = 2**spec.bits - 1
    theta = torch.maximum(low.abs(), high.abs())
    positive, negative = (low >= 0).all(), (high <= 0).all()
    scale = torch.where(positive | negative, theta / levels, 2 * theta / levels).clamp_min(MIN_SCALE)
    middle = torch.where(negative, levels, 2 ** (spec.bits - 1))
    zero_point = torch.where(positive, 0, middle).to(scale.dtype)
    return Grid(scale, zero_point.expand_as(scale).clone(), spec)


def _best(values: Tensor, lows: Tensor, highs: Tensor, spec: QuantSpec, p: float) -> tuple[Tensor, Tensor]:
    """values [R, K]; lows, highs [M, R] candidates. Returns the (low, high) with the least mean |x - x^|^p per row."""
    if spec.kind == "unsigned_mid" and bool((values < 0).any()) and bool((values > 0).any()):
        # Whether a grid is one-sided is the whole tensor's affair, never a chunk's.
        highs = torch.maximum(lows.abs(), highs.abs())
        lows = -highs
    candidates, rows = lows.shape
    chunk = min(CHUNK, CPU_CHUNK) if values.is_cpu else CHUNK
    group = max(1, chunk // max(1, values.shape[1]))  # (candidate, row) pairs at once
    rows_at_once = max(1, min(rows, group))
    errors = torch.empty_like(lows)
    for r in range(0, rows, rows_at_once):
        part = values[r : r + rows_at_once]
        step = max(1, group // part.shape[0])
        for m in range(0, candidates, step):
            window = (slice(m, m + step), slice(r, r + rows_at_once))
            errors[window] = _errors(part, lows[window], highs[window], spec, p)
    best = errors.argmin(0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


@torch.no_grad()
def _errors(values: Tensor, lows: Tensor, highs: Tensor, spec: QuantSpec, p: float) -> Tensor:
    """values [R, K]; lows, highs [M, R]. Returns [M, R], the mean |x - x^|^p; every step in one buffer of [M, R, K]."""
    grid = grid_from_range(lows.flatten(), highs.flatten(), spec).view(*lows.shape, 1)
    return grid.centred(values).mul_(grid.scale).sub_(values).abs_().pow_(p).mean(-1)


@dataclass(frozen=True)
class MinMax:
    """The whole range of the values."""

    def __call__(self, values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return values.amin(1), values.amax(1)


@dataclass(frozen=True)
class ShrinkSearch:
    """Both ends shrunk together by 1.00, 0.99, ...: the best by mean |x - x^|^p (Q-Diffusion's and BRECQ's search)."""

    candidates: int = 80
    p: float = 2.4

    def __call__(self, values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        factors = 1 - 0.01 * torch.arange(self.candidates, dtype=values.dtype, device=values.device)
        low, high = values.amin(1), values.amax(1)
        if spec.kind == "affine":
            low, high = low.clamp_max(0), high.clamp_min(0)
        return _best(values, factors[:, None] * low, factors[:, None] * high, spec, self.p)

    def __post_init__(self) -> None:
        if not 1 <= self.candidates <= 100:
            raise ValueError(f"shrink search: expected 1 to 100 candidates, found {self.candidates}")


@dataclass(frozen=True)
class ThetaSearch:
    """Symmetric ends theta = max|x| i / n, i = 1 ... n: the best by mean |x - x^|^p (EDA-DM)."""

    candidates: int = 100
    p: float = 2.4

    def __call__(self, values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        share = torch.arange(1, self.candidates + 1, dtype=values.dtype, device=values.device) / self.candidates
        theta = share[:, None] * values.abs().amax(1)
        zero = torch.zeros_like(theta)
        return _best(
            values,
            zero if bool((values >= 0).all()) else -theta,
            zero if bool((values <= 0).all()) else theta,
            spec,
            self.p,
        )


@dataclass(frozen=True)
class Percentile:
    """Both tails cut at the best of some percentiles by mean |x - x^|^p (QuEST)."""

    shares: tuple[float, ...] = (0.999, 0.9999, 0.99999)
    p: float = 2.0

    def __call__(self, values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        ordered, last = values.sort(1).values, values.shape[1] - 1
        lows = torch.stack([ordered[:, round((1 - share) * last)] for share in self.shares])
        highs = torch.stack([ordered[:, round(share * last)] for share in self.shares])
        return _best(values, lows, highs, spec, self.p)


Finder = Callable[[Tensor, QuantSpec], tuple[Tensor, Tensor]]
FINDERS = dict(zip(RANGE_FINDERS, (MinMax, ShrinkSearch, ThetaSearch, Percentile), strict=True))


def make_finder(spec: RangeSpec) -> Finder:
    """The finder that `spec` describes."""
    kind = FINDERS[spec.finder]
    options = {"candidates": spec.candidates, "p": spec.p}
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in options.items() if name in known and value is not None})
