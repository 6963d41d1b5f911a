import math

import pytest
import torch

from qdiff.evaluation.similarity import pooled_psnr_db, psnr_db, to_uint8

GREY = torch.full((3, 3, 8, 8), 0.5)


@pytest.mark.parametrize("offset", [0.25, -0.125], ids=["brighter", "darker"])
def test_a_constant_offset_has_a_known_psnr(offset):
    expected = -20 * math.log10(abs(offset))
    assert psnr_db(GREY + offset, GREY).tolist() == pytest.approx([expected] * 3, rel=1e-12)
    assert pooled_psnr_db(GREY + offset, GREY) == pytest.approx(expected, rel=1e-12)


def test_pooling_averages_errors_and_not_decibels():
    images = GREY + torch.tensor([0.0, 0.125, 0.25]).view(3, 1, 1, 1)
    assert psnr_db(images, GREY).tolist() == pytest.approx([math.inf, 18.0618, 12.0412], abs=1e-4)
    assert pooled_psnr_db(images, GREY) == pytest.approx(10 * math.log10(3 / (0.125**2 + 0.25**2)), rel=1e-12)


def test_identical_images_are_infinitely_alike():
    assert pooled_psnr_db(GREY, GREY.clone()) == math.inf
    assert psnr_db(GREY, GREY.clone()).isposinf().all()


def test_eight_bit_rounding_hides_what_a_png_hides():
    reference = torch.full((1, 3, 4, 4), 100 / 255)
    images = reference + 0.4 / 255
    assert pooled_psnr_db(images, reference, eight_bit=True) == math.inf
    assert pooled_psnr_db(images, reference) == pytest.approx(-20 * math.log10(0.4 / 255), abs=1e-3)
    one_level_off = reference + 0.6 / 255
    assert pooled_psnr_db(one_level_off, reference, eight_bit=True) == pytest.approx(20 * math.log10(255), abs=1e-3)


def test_an_image_with_nan_has_no_psnr():
    images = GREY.clone()
    images[1, 0, 0, 0] = torch.nan
    found = psnr_db(images, GREY, eight_bit=True)
    assert found.isnan().tolist() == [False, True, False]
    assert math.isnan(pooled_psnr_db(images, GREY))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (GREY[:2], r"found \[2, 3, 8, 8\] and \[3, 3, 8, 8\]"),
        (GREY * 3, r"images: expected values in \[0, 1\], found 1.5 to 1.5"),
        ((GREY * 255).to(torch.uint8), "found uint8"),
    ],
    ids=["shape", "range", "integers"],
)
def test_images_that_do_not_compare_are_an_error(images, message):
    with pytest.raises(ValueError, match=message):
        psnr_db(images, GREY)


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match=r"found \[0, 3, 8, 8\]"):
        pooled_psnr_db(GREY[:0], GREY[:0])


def test_all_256_levels_survive():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels / 255), levels)
    assert torch.equal(to_uint8(levels.double() / 255), levels)


def test_levels_are_rounded_to_the_nearest():
    assert to_uint8(torch.tensor([0.4, 0.6, 254.6]) / 255).tolist() == [0, 1, 255]


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan], ids=["below", "above", "NaN"])
def test_values_without_a_level_are_an_error(value):
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\]"):
        to_uint8(torch.tensor([0.5, value]))
