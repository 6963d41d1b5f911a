"""PNG in and out, and the pixels of images of other modes."""

import os

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from qdiff.utils.atomic import atomic

PICTURE_CHANNELS = (1, 3)
PICTURE_CHANNELS_SAID = "1 (grey) or 3 (RGB), which pictures can be made of"
EIGHT_BITS = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV")  # modes of Pillow that its own conversion reads rightly
WITH_ALPHA = ("LA", "PA", "RGBA")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
DAMAGED = (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError)


class UnfitImage(ValueError):
    """An image whose pixels have no one meaning in 8 bits; the message names its file and its mode."""


def save_png(image: Tensor, path: str | os.PathLike) -> None:
    """Writes an 8-bit PNG, complete or not at all. image: [C, H, W] in [0, 1], C = 1 or 3.

    Raises ValueError for another shape.
    """
    if image.dim() != 3 or image.shape[0] not in PICTURE_CHANNELS:
        raise ValueError(f"{path}: expected an image of shape [1 or 3, H, W], found {list(image.shape)}")
    pixels = image.detach().float().mul(255).add(0.5).clamp(0, 255).to("cpu", torch.uint8)
    pixels = pixels.permute(1, 2, 0).squeeze(-1).numpy()  # [H, W, 3], or [H, W] in grey
    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def load_png(path: str | os.PathLike) -> Tensor:
    """Returns [C, H, W] float32 in [0, 1], C = 1 for grey images and 3 for all others; 16 bits become 8.

    Raises FileNotFoundError, ValueError for a file that is no image, and UnfitImage as `pixels_of` does.
    """
    try:
        with Image.open(path) as file:
            pixels = pixels_of(file, path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except DAMAGED as error:
        raise ValueError(f"{path} is not a readable image: {error}") from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).float() / 255


def pixels_of(file: Image.Image, path: str | os.PathLike) -> np.ndarray:
    """The pixels of an open image, uint8 [H, W] for grey ones of 8 or 16 bits, [H, W, 3] for all others.

    Pillow's own conversion clips 16 bits of grey to white, cuts those of colours off, and drops transparency. Raises
    UnfitImage for modes and depths that have no one reading: floats, whole numbers of 32 bits, colours of 16 bits,
    transparent pixels.
    """
    sixteen = any(";16" in str(tile[-1]) for tile in getattr(file, "tile", ()))  # before loading empties it
    values = np.array(file)
    transparent = file.info.get("transparency")
    if file.mode in SIXTEEN_BITS or (file.mode == "I" and file.format == "PNG"):
        if transparent is not None and (values == transparent).any():
            raise _unfit(path, f"mode {file.mode} with transparent pixels")
        return ((2 * values.astype(np.int64) + 257) // 514).astype(np.uint8)  # v / 257, rounded
    if file.mode not in EIGHT_BITS + WITH_ALPHA:
        raise _unfit(path, f"mode {file.mode}")
    if sixteen:
        raise _unfit(path, f"mode {file.mode} of 16 bits")
    if file.mode in WITH_ALPHA or transparent is not None:
        file = file.convert("RGBA")
        if file.getextrema()[3][0] < 255:
            raise _unfit(path, f"mode {file.mode} with transparent pixels")
    return np.array(file if file.mode == "L" else file.convert("RGB"))


def _unfit(path: str | os.PathLike, found: str) -> UnfitImage:
    return UnfitImage(f"{path}: expected opaque colours of 8 bits, or grey of 8 or 16 bits, found {found}")
