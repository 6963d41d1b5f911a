"""Dataclasses to plain data and back, checked: what YAML files and checkpoints hold."""

from __future__ import annotations

import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from qdiff.utils.errors import FieldError

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80

TAG = "stage"  # the key that says which of several dataclasses a mapping is


def brief(value: Any) -> str:
    """`repr` for messages, cut short: what a file holds may be of any size and depth."""
    return _brief.repr(value)


def one_of(name: str, value: Any, valid: Iterable[Any]) -> None:
    """Raise a ValueError naming the field and its valid values unless `value` is one of them."""
    valid = tuple(valid)
    if value not in valid:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, valid))}, found {brief(value)}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise a FieldError unless low <= value <= high."""
    if not low <= value <= high:
        raise FieldError(name, f": expected a value from {low} to {high}, found {brief(value)}")


def to_plain(value: Any, tags: Mapping[str, type]) -> Any:
    """Nested dataclasses, tuples and dictionaries as dictionaries and lists; dataclasses in `tags` carry their name."""
    if is_dataclass(value):
        plain = {f.name: to_plain(getattr(value, f.name), tags) for f in fields(value)}
        names = [name for name, kind in tags.items() if type(value) is kind]
        return {TAG: names[0], **plain} if names else plain
    if isinstance(value, (tuple, list)):
        return [to_plain(item, tags) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item, tags) for key, item in value.items()}
    return value


def from_plain(kind: Any, plain: Any, where: str, tagged: Mapping[Any, Mapping[str, type]]) -> Any:
    """Build the annotated type `kind` from plain data, the inverse of `to_plain`.

    `where` names the place in error messages; `tagged` maps a union type to the dataclasses it may be, by name. Raises
    ValueError naming an unknown field, tag or a value of the wrong type.
    """
    if kind in tagged:
        name = plain.get(TAG) if isinstance(plain, dict) else None
        one_of(f"{where}: {TAG}", name, tagged[kind])
        plain = {key: item for key, item in plain.items() if key != TAG}
        return from_plain(tagged[kind][name], plain, where, tagged)
    if is_dataclass(kind):
        return _dataclass(kind, plain, where, tagged)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if plain is None and type(None) in arguments:
            return None
        return from_plain(next(a for a in arguments if a is not type(None)), plain, where, tagged)
    if origin is tuple:
        _expect((list, tuple), "a list", plain, where)
        return tuple(from_plain(arguments[0], item, f"{where}[{i}]", tagged) for i, item in enumerate(plain))
    if origin is dict:
        _expect(dict, "a mapping", plain, where)
        return {key: from_plain(arguments[1], item, f"{where}.{key}", tagged) for key, item in plain.items()}
    return _scalar(kind, plain, where)


def _dataclass(kind: type, plain: Any, where: str, tagged: Mapping[Any, Mapping[str, type]]) -> Any:
    """A dataclass from a mapping of its fields."""
    _expect(dict, "a mapping", plain, where)
    hints = typing.get_type_hints(kind)
    for key in plain:
        one_of(f"{where}: field", key, hints)
    for needed in fields(kind):
        if needed.default is MISSING and needed.default_factory is MISSING and needed.name not in plain:
            raise ValueError(f"{where}: field {needed.name} is missing")
    values = {key: from_plain(hints[key], item, f"{where}.{key}", tagged) for key, item in plain.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _expect(kind: type | tuple[type, ...], name: str, plain: Any, where: str) -> None:
    if not isinstance(plain, kind):
        raise ValueError(f"{where}: expected {name}, found {brief(plain)}")


def _scalar(kind: type, plain: Any, where: str) -> Any:
    if kind is float and isinstance(plain, str):  # YAML 1.1 takes 1e-3 for text
        with suppress(ValueError):
            return float(plain)
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(plain, accepted) or (isinstance(plain, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {kind.__name__}, found {brief(plain)}")
    return kind(plain)
