"""Where a convolution's windows lie, and what its weights sum to over the part of a window inside the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.deploy.kernels.codes import KernelWeight

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation of a convolution, vertical first; a linear layer is the default, a 1x1 one."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def size(self, kernel: Pair, image: Pair) -> Pair:
        """The output's height and width. Raises ValueError for an image smaller than the kernel."""
        sides = zip(image, kernel, self.stride, self.padding, self.dilation, strict=True)
        found = tuple((n + 2 * pad - gap * (k - 1) - 1) // step + 1 for n, k, step, pad, gap in sides)
        if min(found) < 1:
            raise ValueError(f"convolution of {kernel} with padding {self.padding}: found an image of {image}")
        return found


@dataclass(frozen=True)
class Windows:
    """Sums of centred weight codes over the taps of a window that lie inside the image.

    Windows at the border miss taps; those that miss the same ones are a class. classes: [OH * OW] int32, the class of
    each output pixel; sums: [number of classes, O] int32. Padding is stored as 0 in the product, and the activations'
    zero point then takes part through these sums at exactly the taps that see an activation.
    """

    classes: Tensor
    sums: Tensor


def windows(weight: KernelWeight, geometry: Geometry, image: Pair) -> Windows:
    """The window sums of a weight for images of that height and width."""
    kernel = weight.kernel_size
    device = weight.codes.device
    seen = []  # per side: [output positions, taps], whether the tap is inside
    for side, length in enumerate(geometry.size(kernel, image)):
        start = torch.arange(length) * geometry.stride[side] - geometry.padding[side]
        at = start[:, None] + torch.arange(kernel[side]) * geometry.dilation[side]
        seen.append((at >= 0) & (at < image[side]))
    (rows, row_class), (columns, column_class) = (torch.unique(s, dim=0, return_inverse=True) for s in seen)
    taps = weight.centred().sum(-1)  # [O, kh, kw]
    by_row = (rows.to(device)[None, :, :, None] * taps[:, None]).sum(2)  # [O, row classes, kw]
    sums = (by_row[:, :, None] * columns.to(device)[None, None]).sum(-1)  # [O, row classes, column classes]
    classes = row_class[:, None] * len(columns) + column_class[None]
    return Windows(
        classes.flatten().to(device, torch.int32).contiguous(),
        sums.flatten(1).t().to(torch.int32).contiguous(),
    )
