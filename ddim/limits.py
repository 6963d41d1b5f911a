"""Bounds on the sizes that a description may give a network, so that a small file cannot fill the machine: far beyond
every published network, and checked before any module is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

WIDTH = 2**15  # channels of a layer, and of what a network is conditioned on
LEVELS = 16
BLOCKS = 64  # of a level, and transformer blocks in a row
SIDE = 2**14  # of an image or a map of latents
TIMESTEPS = 10**6
CLASSES = 2**20  # labels, words, and entries of a codebook
POSITIONS = 2**16  # tokens of a prompt


def check_limits(found: Mapping[str, int | None | Iterable[int]], limits: Mapping[str, int]) -> None:
    """Raise ValueError naming the first size that is no whole number from 0 to its limit. Sizes may be lists; None is
    no size."""
    for name, limit in limits.items():
        sizes = found.get(name)
        for size in sizes if isinstance(sizes, (list, tuple)) else [sizes]:
            if size is not None and (type(size) is not int or not 0 <= size <= limit):
                raise ValueError(f"{name}: expected whole numbers up to {limit}, found {size!r:.40}")
