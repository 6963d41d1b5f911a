"""Pixels of images of every mode that Pillow opens: read rightly, or refused by file and mode."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from qdiff.utils.images import UnfitImage, load_png, pixels_of

GREY = np.random.default_rng(0).integers(0, 256, (5, 7), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
FILE = "folder/0.png"


def png(path, kind, depth, rows, extra=b""):
    """Write a PNG file by hand. rows: bytes of each; extra: chunks before the data."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 7, 5, depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    transparency = chunk(b"tRNS", extra) if extra else b""
    content = chunk(b"IHDR", header) + transparency + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_grey_of_16_bits_in_memory(mode):
    values = (GREY.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (7, 5), values.tobytes())
    assert np.array_equal(pixels_of(image, FILE), GREY)


def test_grey_of_16_bits_in_files(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "a.png")
    Image.fromarray(GREY).save(tmp_path / "b.png")
    assert torch.equal(load_png(tmp_path / "a.png"), load_png(tmp_path / "b.png"))
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "a.tif")
    assert torch.equal(load_png(tmp_path / "a.tif"), load_png(tmp_path / "b.png"))


def test_16_bits_are_rounded():
    values = np.array([[0, 128, 129, 385, 386, 65406, 65407, 65535]], np.uint16)
    assert pixels_of(Image.fromarray(values), FILE).tolist() == [[0, 0, 1, 1, 2, 254, 255, 255]]


def test_whole_numbers_are_16_bits_in_a_png_alone():
    """As older versions of Pillow open them."""
    image = Image.fromarray(GREY.astype(np.int32) * 257)
    image.format = "PNG"
    assert image.mode == "I" and np.array_equal(pixels_of(image, FILE), GREY)


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "HSV", "LA", "RGBA"])
def test_modes_that_pillow_converts(mode):
    image = Image.fromarray(COLOUR).convert(mode)
    expected = np.array(image.convert("RGB"))
    assert np.array_equal(pixels_of(image, FILE), expected)
    near = {"CMYK": 0, "YCbCr": 4, "RGBA": 0}
    if mode in near:  # those that keep colours
        assert abs(expected.astype(int) - COLOUR).max() <= near[mode]


@pytest.mark.parametrize("mode", ["I", "F", "LAB", "RGBa"])
def test_modes_without_one_reading_are_refused(mode):
    with pytest.raises(UnfitImage, match=rf"^{FILE}: expected .*, found mode {mode}$"):
        pixels_of(Image.new(mode, (7, 5)), FILE)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_are_refused(mode):
    image = Image.fromarray(COLOUR).convert(mode)
    image.putpixel((3, 2), (9, 254) if mode == "LA" else (9, 9, 9, 254))
    with pytest.raises(UnfitImage, match=rf"{FILE}: .* with transparent pixels"):
        pixels_of(image, FILE)


@pytest.mark.parametrize(("value", "refused"), [(3, True), (4, False)])
def test_a_transparent_colour_is_refused_where_it_occurs(tmp_path, value, refused):
    for name, depth, pixel in (("8", 8, b"\x03"), ("16", 16, b"\0\x03")):
        path = png(tmp_path / f"{name}.png", 0, depth, [pixel * 7] * 5, struct.pack(">H", value))
        if refused:
            with pytest.raises(UnfitImage, match=rf"{name}\.png: .* with transparent pixels"):
                load_png(path)
        else:
            assert (load_png(path) * 255).round().unique().tolist() == [3 if depth == 8 else 0]


def test_colours_of_16_bits_are_refused(tmp_path):
    """Of which Pillow hands out the upper halves alone."""
    path = png(tmp_path / "a.png", 2, 16, [bytes(range(42))] * 5)
    with pytest.raises(UnfitImage, match=r"a\.png: .* found mode RGB of 16 bits"):
        load_png(path)
