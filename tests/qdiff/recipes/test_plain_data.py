"""Dataclasses of any shape to plain data and back; what real recipes do is in recipes/test_recipe.py."""

import json
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given

from qdiff.recipes.plain_data import from_plain, one_of, to_plain, within


@dataclass(frozen=True)
class Circle:
    radius: float = 1.0


@dataclass(frozen=True)
class Box:
    sides: tuple[float, ...] = (1.0, 1.0)
    label: str | None = None


@dataclass(frozen=True)
class Point:
    x: float = 0.0


Shape = Circle | Box
SHAPES = {"circle": Circle, "box": Box}


@dataclass(frozen=True)
class Drawing:
    title: str
    visible: bool = True
    copies: int = 1
    shapes: tuple[Shape, ...] = ()
    named: dict[str, Point] = field(default_factory=dict)
    centre: Point | None = None


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
CIRCLES, POINTS = st.builds(Circle, NUMBERS), st.builds(Point, NUMBERS)
BOXES = st.builds(Box, st.lists(NUMBERS).map(tuple), st.none() | st.text())
DRAWINGS = st.builds(
    Drawing,
    st.text(),
    st.booleans(),
    st.integers(),
    st.lists(CIRCLES | BOXES).map(tuple),
    st.dictionaries(st.text(), POINTS),
    st.none() | POINTS,
)


def read(plain):
    return from_plain(Drawing, plain, "drawing", {Shape: SHAPES})


@given(DRAWINGS)
def test_everything_comes_back_even_through_json(drawing):
    assert read(json.loads(json.dumps(to_plain(drawing, SHAPES)))) == drawing


def test_plain_data_are_mappings_and_lists_with_tags_on_the_tagged_only():
    plain = to_plain(Drawing("x", shapes=(Circle(2.0),), named={"a": Point()}), SHAPES)
    assert plain["shapes"] == [{"stage": "circle", "radius": 2.0}] and plain["named"] == {"a": {"x": 0.0}}
    assert plain["centre"] is None and plain["copies"] == 1


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (
            {"title": "x", "shapes": [{"stage": "box", "sides": [1, "two"]}]},
            r"drawing.shapes[0].sides[1]: expected float",
        ),
        ({"title": "x", "shapes": [{"stage": "line"}]}, "drawing.shapes[0]: stage: expected one of circle, box"),
        ({"title": "x", "shapes": ["circle"]}, "drawing.shapes[0]: stage: expected one of circle, box, found None"),
        ({"title": "x", "named": {"a": {"x": None}}}, "drawing.named.a.x: expected float, found None"),
        ({"title": "x", "centre": []}, "drawing.centre: expected a mapping, found []"),
        ({"title": None}, "drawing.title: expected str, found None"),
        ({"title": "x", "visible": 0}, "drawing.visible: expected bool, found 0"),
        ({"title": "x", "copies": True}, "drawing.copies: expected int, found True"),
        ({}, "drawing: field title is missing"),
    ],
    ids=["deep", "tag", "no-mapping", "in-a-mapping", "optional", "none", "bool", "int", "missing"],
)
def test_errors_say_where(plain, message):
    with pytest.raises(ValueError) as error:
        read(plain)
    assert str(error.value).startswith(message)


def test_bounds_include_their_ends_and_exclude_nan():
    within("share", 0, 0, 1)
    within("share", 1, 0, 1)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"share: expected a value from 0 to 1, found {value}"):
            within("share", value, 0, 1)


def test_choices_are_listed():
    one_of("kind", "a", ["a", "b"])
    with pytest.raises(ValueError, match="kind: expected one of a, b, found 'c'"):
        one_of("kind", "c", ["a", "b"])
