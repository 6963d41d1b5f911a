"""PATH=VALUE: fields of a recipe by their dotted paths, changed after all else has made it."""

from __future__ import annotations

import copy
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import yaml

from qdiff.recipes.plain_data import TAG, to_plain
from qdiff.recipes.recipe import Recipe, softmax_spec
from qdiff.recipes.stages import STAGES
from qdiff.utils.errors import FieldError
from qdiff.utils.files import parse_yaml

PART = re.compile(r"([^\[\].\s]+)(?:\[(\d+)\])?")  # name, or name[2]


@dataclass(frozen=True)
class _Places:
    """Where a path leads: mappings of one kind in the plain recipe, several where it goes into several stages."""

    kind: Any  # the dataclass that they stand for, or dict[str, a dataclass]
    found: list[dict[str, Any]]


def apply_overrides(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """The recipe with fields changed, one by each "PATH=VALUE", in their order.

    A path is dotted and starts with a field of the recipe, as "weights.bits", or with a stage's name, as
    "reconstruct.learn.scale.rate". Several stages of a name, and several rules, are meant all, or one of them by
    "reconstruct[2].iterations", counted from 1. Where some of them lack what the path goes into (a penalty, a learned
    group), the others are meant; where all lack it, all get it with its defaults, and softmax with the grid that it
    has when it is null. VALUE is YAML; null takes a learned group away.

    Raises FieldError for "changes" in one line that names the path: one that is not there, a stage that the recipe does
    not have, a whole stage, an assignment without "=", a value that does not fit. The recipe is judged when all are
    applied, so that values that depend on one another may come in any order.
    """
    plain, wrong = recipe.to_dict(), None
    for assignment in assignments:
        path, value = _parse(assignment)
        if path.startswith("softmax.") and plain["softmax"] is None and recipe.activations is not None:
            plain["softmax"] = to_plain(softmax_spec(replace(recipe, compat=())), {})
        _assign(plain, path, value)
        try:
            recipe, wrong = Recipe.from_dict(plain), None
        except ValueError as error:
            if wrong is None or str(error) != wrong[1]:
                wrong = (path, str(error))  # the assignment that brought this error
    if wrong is not None:
        raise FieldError("changes", f" {wrong[0]}: {wrong[1]}")
    return recipe


def _parse(assignment: str) -> tuple[str, Any]:
    """Path and value of an assignment."""
    path, equals, text = assignment.partition("=")
    path = path.strip()
    if not equals or not path:
        raise FieldError("changes", f": expected PATH=VALUE, as reconstruct.iterations=100, found {assignment!r}")
    try:
        return path, parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise _wrong(path, f"expected YAML, found {text!r}: {' '.join(str(error).split())}") from error


def _wrong(path: str, reason: str) -> FieldError:
    return FieldError("changes", f" {path}: {reason}")


def _one_of(path: str, name: str, valid: Iterable[str]) -> None:
    if name not in valid:
        raise _wrong(path, f"expected one of {', '.join(valid)}, found {name!r}")


def _assign(plain: dict[str, Any], path: str, value: Any) -> None:
    """Change the plain recipe where the path leads."""
    parts = [PART.fullmatch(part) for part in path.split(".")]
    if not all(parts):
        raise _wrong(path, "expected names joined by dots, as reconstruct[2].learn.scale.rate")
    (name, index), *inner = [(part[1], None if part[2] is None else int(part[2])) for part in parts]
    if name in STAGES:
        stages = _picked(plain["stages"], name, index, path)
        if not inner:
            raise _wrong(path, f"expected a field of it, as {path}.{fields(STAGES[name])[0].name}=...")
        places = _Places(STAGES[name], stages)
    else:
        known = [field.name for field in fields(Recipe) if field.name != "stages"]
        _one_of(path, name, [*known, *dict.fromkeys(stage[TAG] for stage in plain["stages"])])
        places, inner = _Places(Recipe, [plain]), [(name, index), *inner]
    for name, index in inner[:-1]:
        places = _inside(places, name, index, path)
    name, index = inner[-1]
    if index is not None:
        raise _wrong(path, f"expected a field of {name}[{index}]")
    _store(places, name, value, path)


def _picked(entries: list[dict[str, Any]], name: str, index: int | None, path: str) -> list[dict[str, Any]]:
    """The stages of a name, or the rules; or the one of them that the index, from 1, names."""
    stages = name in STAGES
    found = [entry for entry in entries if entry[TAG] == name] if stages else entries
    if not found:
        names = ", ".join(dict.fromkeys(entry[TAG] for entry in entries)) if stages else ""
        raise _wrong(path, f"the recipe has no {name}" + (f", its stages are {names}" if names else ""))
    if index is not None and not 1 <= index <= len(found):
        raise _wrong(path, f"expected {name}[1] to {name}[{len(found)}], found {name}[{index}]")
    return found if index is None else [found[index - 1]]


def _inside(places: _Places, name: str, index: int | None, path: str) -> _Places:
    """The mappings under a name, of the places that have it; made in all of them where none has it."""
    kind = _kind_of(places, name, path)
    if typing.get_origin(kind) is tuple and is_dataclass(typing.get_args(kind)[0]):
        kind, lists = typing.get_args(kind)[0], [place[name] for place in places.found]
        found = _picked([entry for entries in lists for entry in _given(list, entries, name, path)], name, index, path)
        return _Places(kind, [_given(dict, entry, name, path) for entry in found])
    if index is not None or not (is_dataclass(kind) or typing.get_origin(kind) is dict):
        raise _wrong(path, f"{name} has {'no entries' if index is not None else 'no fields'}")
    having = [_given(dict, place[name], name, path) for place in places.found if place.get(name) is not None]
    if not having:
        for place in places.found:
            place[name] = {}
            having.append(place[name])
    return _Places(kind, having)


def _given(kind: type, value: Any, name: str, path: str) -> Any:
    """The value under a name, as long as no assignment before has put one of another kind there."""
    if not isinstance(value, kind):
        raise _wrong(path, f"{name} has no fields, since it was set to {value!r}")
    return value


def _store(places: _Places, name: str, value: Any, path: str) -> None:
    """Set a field of dataclasses, or an entry of mappings, which null removes."""
    _kind_of(places, name, path)
    having = places.found if is_dataclass(places.kind) else [place for place in places.found if name in place]
    if value is None and not is_dataclass(places.kind):
        if not having:
            known = dict.fromkeys(key for place in places.found for key in place)
            raise _wrong(path, f"nothing to remove, expected one of {', '.join(known)}, found {name!r}")
        for place in having:
            del place[name]
        return
    for place in having or places.found:
        place[name] = copy.deepcopy(value)  # not one value in several stages: the next assignment may change one


def _kind_of(places: _Places, name: str, path: str) -> Any:
    """The annotated type under a name, without the "or None". Raises ValueError naming the valid fields."""
    if not is_dataclass(places.kind):
        return typing.get_args(places.kind)[1]
    hints = typing.get_type_hints(places.kind)
    _one_of(path, name, hints)
    kind = hints[name]
    if typing.get_origin(kind) is types.UnionType:
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
    return kind
