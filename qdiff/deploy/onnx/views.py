"""Which axes of a recorded tensor a view of it shows, in which order: reshapes and transposes as bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A view of a tensor whose axes were cut into `sizes`, row by row; axis i of the view runs over the cut axes
    `dims[i]`, the first one slowest. An axis of length 1 that was added has none."""

    sizes: Axes
    dims: tuple[Axes, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Layout:
        """The tensor as it is."""
        return cls(tuple(shape), tuple((axis,) for axis in range(len(shape))))

    @property
    def shape(self) -> Axes:
        return tuple(math.prod(self.sizes[axis] for axis in dim) for dim in self.dims)

    @property
    def is_whole(self) -> bool:
        return self.dims == tuple((axis,) for axis in range(len(self.sizes)))

    def permute(self, order: Sequence[int]) -> Layout:
        """The view with its axes in another order."""
        return Layout(self.sizes, tuple(self.dims[axis] for axis in order))

    def reshape(self, shape: Sequence[int]) -> Layout:
        """The view's elements, row by row, as another shape without -1.

        Raises ValueError where an axis would take parts of two others.
        """
        pieces: list[list[int]] = [[] for _ in self.sizes]
        left = [(axis, self.sizes[axis]) for dim in self.dims for axis in dim if self.sizes[axis] > 1]
        left.reverse()
        taken: list[list[tuple[int, int]]] = []
        for size in shape:
            dim, wanted = [], size
            while wanted > 1 and left:
                axis, length = left.pop()
                part = math.gcd(length, wanted)
                if part not in (length, wanted):
                    raise ValueError(f"no view of shape {list(shape)} of one of shape {list(self.shape)}")
                if part < length:
                    left.append((axis, length // part))
                dim.append((axis, len(pieces[axis])))
                pieces[axis].append(part)
                wanted //= part
            if wanted != 1:
                raise ValueError(f"no view of shape {list(shape)} of one of shape {list(self.shape)}")
            taken.append(dim)
        if left:
            raise ValueError(f"no view of shape {list(shape)} of one of shape {list(self.shape)}")
        cut = [found or [size] for found, size in zip(pieces, self.sizes, strict=True)]
        first = [sum(len(axes) for axes in cut[:axis]) for axis in range(len(cut))]
        dims = tuple(tuple(first[axis] + index for axis, index in dim) for dim in taken)
        return Layout(tuple(size for axes in cut for size in axes), dims)

    def pieces_of(self, shape: Sequence[int]) -> list[Axes]:
        """For each axis of the tensor, which has this shape: the axes that it was cut into."""
        found, axis = [], 0
        for size in shape:
            piece, covered = [axis], self.sizes[axis]
            axis += 1
            while covered < size:
                piece.append(axis)
                covered *= self.sizes[axis]
                axis += 1
            found.append(tuple(piece))
        return found
