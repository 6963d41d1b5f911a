"""The picture of errors along the sampler's steps."""

import pytest
from PIL import Image

from qdiff.evaluation import curves
from qdiff.evaluation.curves import Curve, error_curves

TWO = [Curve("a 4/8", "a", [1e-2, 1e-3, 1e-4], [1e-2, 2e-2, 3e-2]), Curve("b 4/8", "b", [2e-2, 1e-3, 1e-4], [1, 2, 3])]


def open_png(path):
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        return picture.convert("RGB")


def colours(picture, left=0.0, right=1.0):
    """Colours of a part of the picture's width."""
    width = picture.width
    found = picture.crop((int(left * width), 0, int(right * width), picture.height)).getcolors(2**24)
    return {colour for _, colour in found}


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # of the first two groups


def test_a_line_for_each_curve_in_each_panel(tmp_path):
    error_curves(TWO, tmp_path / "errors.png")
    picture = open_png(tmp_path / "errors.png")
    assert picture.width == 1100 and picture.height >= 500
    upper = picture.crop((0, 0, picture.width, picture.height - 60))  # without the legend
    for half in ((0, 0.5), (0.5, 1)):
        assert {BLUE, ORANGE} <= colours(upper, *half)
    assert [path.name for path in tmp_path.iterdir()] == ["errors.png"]


def test_curves_of_a_group_share_its_colour():
    many = [Curve(str(i), str(i // 3), [1.0], [1.0]) for i in range(30)]
    looks = curves._looks(many)
    assert len(set(looks)) == 30
    assert all(len({looks[3 * g + k][0] for k in range(3)}) == 1 for g in range(10))
    assert len(set(curves._looks([Curve(str(i), str(i), None, None) for i in range(25)]))) == 25  # of ten colours


def test_values_that_a_logarithm_cannot_show(tmp_path):
    odd = Curve("odd", "odd", [0.0, float("nan"), 1e-3], [0.0, 0.0, 0.0])
    for number, some in enumerate(([odd], [*TWO, odd], [Curve("none", "none", None, [1e-3, 1e-2, 1e-1])])):
        error_curves(some, tmp_path / f"{number}.png")
        assert open_png(tmp_path / f"{number}.png").width == 1100
    assert BLUE not in colours(open_png(tmp_path / "2.png").crop((0, 0, 1100, 440)), 0, 0.5)


def test_more_entries_make_a_higher_picture(tmp_path):
    many = [Curve(f"a-long-name-of-a-method:{i} 4/8 (per channel)", str(i), [1.0, 2.0], [1.0, 2.0]) for i in range(12)]
    error_curves(many, tmp_path / "many.png")
    error_curves(many[:1], tmp_path / "one.png")
    many, one = (open_png(tmp_path / f"{name}.png") for name in ("many", "one"))
    assert many.width == one.width == 1100 and many.height > one.height


@pytest.mark.long
def test_the_same_picture_twice(tmp_path):
    for name in ("a.png", "b.png"):
        error_curves(TWO, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("given", "names"),
    [([], "at least one"), ([*TWO, Curve("c", "c", None, [1.0])], "one length, found 1, 3")],
)
def test_arguments_that_do_not_fit(tmp_path, given, names):
    with pytest.raises(ValueError, match=names):
        error_curves(given, tmp_path / "errors.png")
    assert not list(tmp_path.iterdir())
