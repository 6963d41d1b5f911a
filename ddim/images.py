"""PNG in and out."""

import os

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ddim.files import atomic


def save_png(image: Tensor, path: str | os.PathLike) -> None:
    """Writes an 8-bit PNG, complete or not at all. image: [C, H, W] in [0, 1], C = 1 or 3.

    Raises ValueError for another shape.
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"{path}: expected an image of shape [1 or 3, H, W], found {list(image.shape)}")
    pixels = image.detach().float().mul(255).add(0.5).clamp(0, 255).to("cpu", torch.uint8)
    pixels = pixels.permute(1, 2, 0).squeeze(-1).numpy()  # [H, W, 3], or [H, W] in grey
    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def load_png(path: str | os.PathLike) -> Tensor:
    """Returns [C, H, W] float32 in [0, 1], C = 1 for grey images and 3 for all others.

    Raises FileNotFoundError, and ValueError for a file that is no image.
    """
    try:
        with Image.open(path) as file:
            pixels = np.array(file if file.mode == "L" else file.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).float() / 255
