"""Images for the report: for each entry one PNG of its images and one of how far they are from the reference's."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from qdiff.evaluation.report import Gallery, Pair, data_uri
from qdiff.evaluation.similarity import to_uint8

BUDGET = 3_500_000  # bytes of all PNGs as addresses, which leaves room for the rest of a page below 5 MB
SIZES = ((16, 160), (16, 96), (8, 96), (8, 64), (4, 64), (4, 32))  # (images, longest side) that are tried in turn
SMALL = 64  # sides up to which pixels stay visible, and more images go into a row
GAP = 2  # transparent pixels between images
VISIBLE = 0.4  # what the middle of the entries' RMS errors comes near to, once it is multiplied
MOST = 5  # powers of two


def make_gallery(reference: Tensor, entries: Sequence[tuple[str, str, Tensor]], budget: int = BUDGET) -> Gallery:
    """Images of entries beside the reference's: as many, and as large, as fit into `budget` bytes.

    reference: [N, C, H, W] in [0, 1], C 1 or 3; entries: (label, caption, images of the same shape). Pixels that are
    not defined are black. Raises ValueError for other shapes or values.
    """
    for label, _, images in entries:
        if images.shape != reference.shape:
            raise ValueError(f"{label}: expected images {list(reference.shape)}, found {list(images.shape)}")
    if reference.ndim != 4 or reference.shape[1] not in (1, 3) or 0 in reference.shape:
        raise ValueError(f"reference: expected images [N, 1 or 3, H, W], found {list(reference.shape)}")
    factor = _factor(reference, [images for _, _, images in entries])
    for count, side in SIZES:
        found = _gallery(reference, entries, count, side, factor)
        if sum(len(pair.images) + len(pair.difference) for pair in (found.reference, *found.pairs)) <= budget:
            break
    return found


def _gallery(
    reference: Tensor, entries: Sequence[tuple[str, str, Tensor]], count: int, side: int, factor: int
) -> Gallery:
    expected = _pixels(reference[:count], side)
    n, pixelated = len(expected), max(reference.shape[2:]) <= SMALL
    columns = min(n, 8 if pixelated else 4)
    sheet = _sheet(expected, columns)
    pairs = []
    for label, caption, images in entries:
        found = _pixels(images[:count], side)
        apart = np.abs(found.astype(np.int16) - expected)
        difference = np.minimum(apart * factor, 255).astype(np.uint8)
        pairs.append(Pair(label, caption, _png(_sheet(found, columns)), _png(_sheet(difference, columns))))
    shown = Pair("float", "", _png(sheet), "")
    return Gallery(n, columns, sheet.shape[1], sheet.shape[0], pixelated, factor, shown, pairs)


def _pixels(images: Tensor, side: int) -> np.ndarray:
    """[N, C, H, W] in [0, 1] -> uint8 [N, h, w, 3], the longest side at most `side`."""
    levels = to_uint8(images.detach().cpu().nan_to_num(0)).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    height, width = levels.shape[1:3]
    if max(height, width) <= side:
        return levels
    ratio = side / max(height, width)
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    return np.stack([np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BOX)) for each in levels])


def _sheet(pixels: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, h, w, 3] -> [H, W, 4]: rows of images with transparent gaps between them."""
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    sheet = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 4), np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width, :3] = image
        sheet[top : top + height, left : left + width, 3] = 255
    return sheet


def _png(sheet: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, format="PNG", optimize=True)
    return data_uri("image/png", file.getvalue())


def _factor(reference: Tensor, entries: Sequence[Tensor]) -> int:
    """A power of two that makes differences visible, the same for all entries so that they can be compared."""
    errors = [(images - reference).double().square().mean().sqrt().item() for images in entries]
    known = [math.log2(error) for error in errors if math.isfinite(error) and error > 0]
    if not known:
        return 1
    wanted = math.floor(math.log2(VISIBLE) - sum(known) / len(known))
    return 2 ** min(max(wanted, 0), MOST)
