"""The parser of every command, and the types of its flags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from qdiff.calibration.store import MemoryLimits


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = action.required or action.default is False or action.default in (None, ())
        return action.help if says_nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Takes flags only as they are spelled, and says in one line what is wrong with them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **options})

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')} (--help lists the flags)\n")


Kind = TypeVar("Kind", bound="Options")


@dataclass(frozen=True)
class Options:
    """What some flags say, typed: a subclass has a field of each flag's name, with its default."""

    @classmethod
    def of(cls: type[Kind], args: argparse.Namespace) -> Kind:
        """Of parsed flags; what a command does not have keeps its default."""
        given = vars(args)
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


def make_parser(description: str) -> argparse.ArgumentParser:
    """A script's parser."""
    return Parser(description=description)


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of a flag that takes a whole number within bounds."""
    wanted = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    return _bounded(int, low, float("inf") if high is None else high, wanted)


def number(low: float, high: float) -> Callable[[str], float]:
    """The type of a flag that takes a number within bounds."""
    return _bounded(float, low, high, f"a number from {low:g} to {high:g}")


SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory_limits(text: str) -> MemoryLimits:
    """The type of --max_memory: a size for the device and the host each, or two of them."""
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", part.strip(), re.IGNORECASE)
        if found is None:
            raise argparse.ArgumentTypeError(f"expected a size such as 8GB, or two as 20GB,60GB, found {text!r}")
        sizes.append(int(float(found[1]) * SIZES[found[2].upper()]))
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"expected one size or two, for device and host, found {text!r}")
    return MemoryLimits(device=sizes[0], host=sizes[-1])


def _bounded(kind: type, low: float, high: float, wanted: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}")
        return value

    return read
