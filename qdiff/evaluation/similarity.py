"""PSNR and SSIM between a quantized model's images and the float model's, seed for seed.

The toolkit's tables report the pooled PSNR: it is finite unless every image is identical, while the mean of per-image
decibels is carried by the few images that hardly changed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # arXiv cs/0404043's window: a Gaussian, its weights adding up to 1
SSIM_K1, SSIM_K2 = 0.01, 0.03  # shares of the range of values, squared, that keep divisions stable


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


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image, float64 [N]: 1 where identical.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (IEEE TIP 2004), over the
    places where the whole window lies inside the image, per channel, averaged over places and channels.
    images, reference: uint8 [N, C, H, W]. Raises ValueError for unequal shapes, others, or sides below the window's.
    """
    if images.dtype != torch.uint8 or reference.dtype != torch.uint8 or images.shape != reference.shape:
        found = " and ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in (images, reference))
        raise ValueError(f"images and reference: expected two equal shapes [N, C, H, W] of uint8, found {found}")
    if images.ndim != 4 or min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"images: expected sides of at least {SSIM_WINDOW} pixels, found {list(images.shape)}")
    a, b = (x.double().flatten(0, 1).unsqueeze(1) for x in (images, reference))
    mean_a, mean_b = _windowed(a), _windowed(b)
    variance_a, variance_b = _windowed(a * a) - mean_a**2, _windowed(b * b) - mean_b**2
    covariance = _windowed(a * b) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (brightness * structure).view(*images.shape[:2], -1).mean((1, 2)).cpu()


def _windowed(x: Tensor) -> Tensor:
    """[M, 1, H, W] float64, averaged with the Gaussian window; [M, 1, H - 10, W - 10]."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = (-0.5 * (offsets / SSIM_SIGMA) ** 2).exp()
    weights = weights / weights.sum()
    rows = F.conv2d(x, weights.view(1, 1, -1, 1))
    return F.conv2d(rows, weights.view(1, 1, 1, -1))


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
