"""FD (CIFAR-10 features): the Fréchet distance between two sets of images in the bundled network's feature space.

Heusel et al. (arXiv 1706.08500), Equation 6, on 256 features of our own network: the numbers are not FIDs and compare
with no published FID. The covariance of few images is biased, so compare only values taken at the same image count.
"""

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.utils import create_feature_extractor

from .features import EXTRACTOR, FEATURE_LAYER, models_folder, register, require_cifar_images


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of the features of `count` images; float64."""

    mu: np.ndarray  # [C]
    sigma: np.ndarray  # [C, C], divided by count - 1
    count: int

    def __post_init__(self):
        if self.mu.ndim != 1 or self.sigma.shape != 2 * self.mu.shape:
            raise ValueError(f"statistics: expected mu [C] and sigma [C, C], found {self.mu.shape}, {self.sigma.shape}")
        if self.mu.dtype != np.float64 or self.sigma.dtype != np.float64:
            raise ValueError(f"statistics: expected float64, found mu {self.mu.dtype} and sigma {self.sigma.dtype}")
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ValueError("statistics: expected finite mu and sigma, found infinite or undefined values")


@torch.no_grad()
def feature_statistics(images: Tensor, batch_size: int = 250, device: str | torch.device = "cpu") -> Statistics:
    """Statistics of the 256 features of images, uint8 [N, 3, 32, 32]; device: where the network runs.

    On a GPU the convolutions follow the process's TF32 setting; the statistics are float64 everywhere.
    Raises ValueError for other images, or for fewer than the two that a covariance takes.
    """
    require_cifar_images(images)
    if len(images) < 2:
        raise ValueError(f"images: expected at least 2 for a covariance, found {len(images)}")
    register()
    extractor = create_feature_extractor(EXTRACTOR, [FEATURE_LAYER], cuda=False, verbose=False).to(device)
    features = torch.cat([extractor(batch.to(device))[0] for batch in images.split(batch_size)])
    return Statistics(**fid_features_to_statistics(features), count=len(images))


def load_train_statistics(path: Path | None = None) -> Statistics:
    """Statistics of the CIFAR-10 training images; path: an npz with mu, sigma and n, by default the bundled one.

    Raises FileNotFoundError where the file is missing, ValueError where it holds something else.
    """
    path = Path(path or models_folder() / EXTRACTOR / "train_statistics.npz")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the feature statistics of the training images, found no file")
    try:
        with np.load(path) as saved:
            return Statistics(saved["mu"], saved["sigma"], int(saved["n"]))
    except (EOFError, KeyError, TypeError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path}: expected an npz with mu [C], sigma [C, C] and n, found: {error}") from error


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)), by torch-fidelity.

    Raises ValueError where the two have different numbers of features.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"statistics: expected two sets of one width, found {len(a.mu)} and {len(b.mu)} features")
    first, second = ({"mu": s.mu, "sigma": s.sigma} for s in (a, b))
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def fd_cifar10(images: Tensor, batch_size: int = 250, device: str | torch.device = "cpu") -> float:
    """FD (CIFAR-10 features) of images, uint8 [N, 3, 32, 32], against the training images."""
    return frechet_distance(feature_statistics(images, batch_size, device), load_train_statistics())
