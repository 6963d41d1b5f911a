import math

import numpy as np
import pytest
import torch

from qdiff.evaluation.similarity import pooled_psnr_db, psnr_db, ssim, to_uint8

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


def ssim_place_by_place(a, b):
    """The formula of Wang et al. (2004), window by window. a, b: [H, W] in levels."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


def test_ssim_is_the_formula():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 14, 17), np.uint8))
    reference = (images.float() * 0.7 + 20 + torch.from_numpy(rng.normal(0, 20, images.shape))).clamp(0, 255).byte()
    expected = [
        np.mean([ssim_place_by_place(a.double().numpy(), b.double().numpy()) for a, b in zip(x, y, strict=True)])
        for x, y in zip(images, reference, strict=True)
    ]
    assert ssim(images, reference).tolist() == pytest.approx(expected, rel=1e-10)
    assert ssim(reference, images).tolist() == pytest.approx(expected, rel=1e-10)


def test_ssim_of_equal_images_is_one():
    images = torch.randint(0, 256, (2, 3, 11, 30), dtype=torch.uint8)
    assert ssim(images, images).tolist() == pytest.approx([1, 1], rel=1e-12)


@pytest.mark.parametrize(
    ("images", "reference", "message"),
    [
        (torch.zeros(1, 3, 12, 12), torch.zeros(1, 3, 12, 12), "found float32"),
        (torch.zeros(1, 3, 12, 12).byte(), torch.zeros(2, 3, 12, 12).byte(), r"\[2, 3, 12, 12\]"),
        (torch.zeros(1, 3, 12, 10).byte(), torch.zeros(1, 3, 12, 10).byte(), "sides of at least 11 pixels"),
    ],
    ids=["float", "shape", "small"],
)
def test_images_without_ssim_are_an_error(images, reference, message):
    with pytest.raises(ValueError, match=message):
        ssim(images, reference)
