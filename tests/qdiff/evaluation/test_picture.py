import numpy as np
import pytest
import torch
from PIL import Image

from qdiff.evaluation.picture import MARGIN, comparison_picture


@pytest.fixture
def images(cifar_test):
    return cifar_test[0][:5] / 255


def picture(path):
    with Image.open(path) as opened:
        assert opened.format == "PNG" and opened.mode == "RGB"
        return np.asarray(opened)


def column_gap(scale):
    return max(3, scale)  # for images 32 wide


@pytest.mark.parametrize("scale", [1, 3])
def test_each_image_is_there_enlarged_by_nearest_neighbour(images, tmp_path, scale):
    path = tmp_path / "compare.png"
    comparison_picture([("", images), ("", 1 - images)], path, columns=4, scale=scale)
    found, side, gap = picture(path), 32 * scale, column_gap(scale)
    assert found.shape == (2 * MARGIN + 2 * side + 3 * gap, 2 * MARGIN + 4 * side + 3 * gap, 3)
    expected = np.full_like(found, 255)
    for row, values in enumerate((images, 1 - images)):
        for column in range(4):
            pixels = (values[column] * 255).round().byte().permute(1, 2, 0).numpy()
            top, left = MARGIN + row * (side + 3 * gap), MARGIN + column * (side + gap)
            expected[top : top + side, left : left + side] = np.kron(pixels, np.ones((scale, scale, 1), np.uint8))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(("scale", "label"), [(3, "Q-Diffusion W4A8"), (1, "a tall\nlabel\nof four\nlines")])
def test_labels_stay_within_their_column(images, tmp_path, scale, label):
    path = tmp_path / "compare.png"
    comparison_picture([(label, images)], path, scale=scale, captions=["11.7 dB, 4.6 MB"])
    found = picture(path)
    text_right = found.shape[1] - MARGIN - 5 * 32 * scale - 4 * column_gap(scale) - MARGIN
    ink = (found < 128).all(axis=2)[:, : text_right + MARGIN]
    rows, columns = np.nonzero(ink)
    assert columns.min() >= MARGIN - 1 and columns.max() <= text_right
    assert text_right - columns.max() < 5  # the widest line sets the width
    assert rows.min() >= MARGIN and rows.max() < found.shape[0] - MARGIN


def test_a_caption_adds_ink_below_its_label(images, tmp_path):
    rows = [("method", images)]
    comparison_picture(rows, tmp_path / "without.png")
    comparison_picture(rows, tmp_path / "with.png", captions=["9 dB"])
    dark = [(picture(tmp_path / name)[:, : MARGIN + 40] < 128).all(axis=2) for name in ("without.png", "with.png")]
    assert dark[1].sum() > dark[0].sum() > 0
    assert np.nonzero(dark[1])[0].max() > np.nonzero(dark[0])[0].max()


def test_undefined_pixels_are_black(images, tmp_path):
    broken = torch.full_like(images, torch.nan)
    comparison_picture([("", broken)], tmp_path / "broken.png", columns=1, scale=1)
    found = picture(tmp_path / "broken.png")
    assert (found[MARGIN : MARGIN + 32, MARGIN : MARGIN + 32] == 0).all()


def test_a_failed_write_leaves_the_old_picture_and_no_litter(images, tmp_path, monkeypatch):
    path = tmp_path / "compare.png"
    path.write_bytes(b"old")

    def fail(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        comparison_picture([("", images)], path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(images, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        comparison_picture([("", images)], tmp_path / "absent" / "compare.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"rows": []}, "rows: expected at least one"),
        (lambda x: {"captions": ["a", "b"]}, r"captions: expected one per row \(1\), found 2"),
        (lambda x: {"columns": 0}, "columns and scale: expected 1 or more, found 0"),
        (lambda x: {"scale": 0}, "found 8 and 0"),
        (lambda x: {"rows": [("a", x), ("b", x[:2])]}, r"row 'b': expected \[5, 3, 32, 32\]"),
        (lambda x: {"rows": [("a", x[:, :1])]}, r"row 'a': expected images \[N, 3, H, W\], found \[5, 1, 32, 32\]"),
        (lambda x: {"rows": [("a", x[:0])]}, r"found \[0, 3, 32, 32\]"),
        (lambda x: {"rows": [("a", x * 255)]}, r"row 'a': expected values in \[0, 1\], found 0 to 255"),
        (lambda x: {"rows": [("a", (x * 255).byte())]}, "row 'a': .* found uint8"),
    ],
)
def test_arguments_that_do_not_fit_are_an_error(images, tmp_path, change, message):
    arguments = {"rows": [("a", images)], "path": tmp_path / "compare.png"} | change(images)
    with pytest.raises(ValueError, match=message):
        comparison_picture(**arguments)
    assert not list(tmp_path.iterdir())
