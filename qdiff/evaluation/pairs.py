"""Which images of two sets belong together: those of one number, or of one name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

NAMED = 3  # images that a message names

Key = int | str


@dataclass(frozen=True)
class Pairs:
    """partners: for every image the index of its partner, None without one; unused: indices of the other set's rest."""

    partners: tuple[int | None, ...]
    unused: tuple[int, ...]

    @property
    def alone(self) -> tuple[int, ...]:
        """Indices of the images without a partner."""
        return tuple(index for index, partner in enumerate(self.partners) if partner is None)


def pair_up(names: Sequence[str], others: Sequence[str]) -> Pairs:
    """Pair files by their numbers where all names of both sets are numbered, else by their names without suffixes."""
    first, second = numbers_of(names), numbers_of(others)
    if first is None or second is None:
        first, second = _stems(names), _stems(others)
    found = {key: index for index, key in enumerate(second)}
    partners = tuple(found.get(key) for key in first)
    return Pairs(partners, tuple(sorted(set(found.values()) - set(partners))))


def numbers_of(names: Sequence[str]) -> tuple[int, ...] | None:
    """The numbers that names end in; None where one has none, two are the same, or what stands before them differs."""
    found = [re.fullmatch(r"(.*?)([0-9]+)", PurePath(name).stem) for name in names]
    if not all(found) or len({match[1] for match in found}) > 1:
        return None
    numbers = tuple(int(match[2]) for match in found)
    return numbers if len(set(numbers)) == len(numbers) else None


def _stems(names: Sequence[str]) -> Sequence[str]:
    stems = [PurePath(name).stem for name in names]
    return stems if len(set(stems)) == len(stems) else names


def few(names: Sequence[str]) -> str:
    """The first names, and how many there are beside."""
    more = f" and {len(names) - NAMED} more" * (len(names) > NAMED)
    return ", ".join(names[:NAMED]) + more
