"""Integer products as they are defined (docs/integer.md): slow, exact, the reference for every kernel.

Values are x = (code - zero_point) * scale. A product of two such tensors is the integer sum of products of centred
codes (code - zero_point), times the two scales.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOAT32_WHOLE, FLOAT64_WHOLE = 2**24, 2**53  # up to there a float holds every whole number


def accumulate(a: Tensor, w: Tensor, terms: int, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The sums of products of two tensors of whole numbers, int64.

    product: a bilinear map of (a, w), a convolution or matrix product with `terms` terms in each of its sums. It is
    carried out in floating point wide enough that every partial sum, in whatever order, is exact. Raises ValueError
    where float64 is not, for sums beyond 2^53.
    """
    bound = terms * _largest(a) * _largest(w)
    if bound > FLOAT64_WHOLE:
        raise ValueError(f"integer product: sums of {terms} products may reach {bound}, which float64 does not hold")
    # Accelerators may take float32 products in a narrower format (TF32).
    dtype = torch.float32 if a.is_cpu and bound <= FLOAT32_WHOLE else torch.float64
    return product(a.to(dtype), w.to(dtype)).to(torch.int64)


def _largest(x: Tensor) -> int:
    return int(x.abs().max()) if x.numel() else 0
