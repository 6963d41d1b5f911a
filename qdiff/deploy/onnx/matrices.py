"""What ONNX Runtime multiplies as bytes: uint8 codes of activations with int8 codes of weights."""

from __future__ import annotations

import numpy as np

from qdiff.deploy.onnx.plans import Codes, GridPlan, PartPlan

MAX_DEPTH = 33000  # products in a sum that int32 holds, of up to 255 * 255 each


def codes_multiply(a: GridPlan | None, b: GridPlan | None) -> bool:
    """Whether both grids have codes of a byte, zero points included, and one scale."""
    return all(g is not None and not g.per_channel and g.bits <= 8 and g.in_range for g in (a, b))


def is_integer(part: PartPlan) -> bool:
    """Whether the part is a product of bytes."""
    whole = part.act is not None and not part.act.per_channel and part.act.bits <= 8 and part.act.in_range
    matrix = int8_matrix(part.weight) if whole else None
    return matrix is not None and len(matrix[0]) <= MAX_DEPTH


def window_matrix(values: np.ndarray) -> np.ndarray:
    """[O, C, *kernel] as [kernel * C, O], rows in the order of a window's."""
    return np.moveaxis(values, (0, 1), (-1, -2)).reshape(-1, len(values))


def int8_matrix(weight: Codes | np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes [K, O] and zero points [O], both moved per channel so that they fit int8; None where they do not."""
    if not isinstance(weight, Codes):
        return None
    codes = weight.codes
    axes = tuple(range(1, codes.ndim))
    fits = (codes.min(axes) - weight.zero_point >= -128) & (codes.max(axes) - weight.zero_point <= 127)
    zero = np.where(fits, 0, weight.zero_point - 128)
    if zero.min() < -128 or zero.max() > 127:
        return None
    moved = (zero - weight.zero_point).astype(np.int16).reshape(-1, *[1] * len(axes))
    return window_matrix((codes + moved).astype(np.int8)), zero.astype(np.int8)
