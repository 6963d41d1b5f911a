"""PSNR between a quantized model's images and the float model's, seed for seed.

The toolkit's tables report the pooled PSNR: it is finite unless every image is identical, while the mean of per-image
decibels is carried by the few images that hardly changed.
"""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """[...] in [0, 1] -> [...] uint8, to the nearest level. Raises ValueError for other values, NaN included."""
    require_unit_range(images, "images")
    if not images.isfinite().all():
        raise ValueError("images: expected values in [0, 1], found undefined ones (NaN)")
    return (images * 255).round().to(torch.uint8)


def psnr_db(images: Tensor, reference: Tensor, eight_bit: bool = False) -> Tensor:
    """PSNR of each image in dB (peak 1), float64 [N]: inf where identical, NaN where an image holds NaN.

    images, reference: [N, C, H, W] in [0, 1]; eight_bit: round both to 256 levels first, as a PNG does.
    Raises ValueError for unequal shapes, no images, integers, or values outside [0, 1].
    """
    return decibels(squared_errors(images, reference, eight_bit))


def pooled_psnr_db(images: Tensor, reference: Tensor, eight_bit: bool = False) -> float:
    """10 log10(1 / mean squared error over all images) in dB; arguments and errors as in `psnr_db`."""
    return decibels(squared_errors(images, reference, eight_bit).mean()).item()


def squared_errors(images: Tensor, reference: Tensor, eight_bit: bool) -> Tensor:
    """Mean squared error of each image, float64 [N] on the CPU."""
    if images.shape != reference.shape or images.ndim != 4 or images.numel() == 0:
        found = f"{list(images.shape)} and {list(reference.shape)}"
        raise ValueError(f"images and reference: expected two equal shapes [N, C, H, W], found {found}")
    require_unit_range(images, "images")
    require_unit_range(reference, "reference")
    a, b = (x.detach().to("cpu", torch.float64) for x in (images, reference))
    if eight_bit:
        a, b = ((x * 255).round() / 255 for x in (a, b))
    return (a - b).square().mean(dim=(1, 2, 3))


def decibels(squared_error: Tensor) -> Tensor:
    return -10 * squared_error.log10()


def require_unit_range(images: Tensor, name: str) -> None:
    """Raises ValueError unless images is floating point and within [0, 1]; NaN passes."""
    if not images.is_floating_point():
        found = str(images.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected floating-point values in [0, 1], found {found}")
    if (images < 0).any() or (images > 1).any():
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"{name}: expected values in [0, 1], found {low:.4g} to {high:.4g}")
