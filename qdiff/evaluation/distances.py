"""Distances between sets of images and scores of one, by torch-fidelity's own functions from features taken once.

The numbers are those of its command line for the same folders, to the last digit: the same batches in the same order,
the same random subsets, means in the dtype of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from qdiff.evaluation.cache import Cache, key_of
from qdiff.evaluation.extractors import CIFAR10_LAYER, POOLED, SPATIAL, WIDTHS, Extractor
from qdiff.evaluation.images import Images, arrays_in, read_array

Advance = Callable[[str, int, int], None]  # (what, done, total): progress of an extraction

# Arrays of a file of statistics: mean and covariance of a layer. ADM's reference files hold both pairs.
STATISTICS = {POOLED: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s"), CIFAR10_LAYER: ("mu", "sigma")}
COUNTS = ("n", "count")  # an array that says of how many images


class NotThere(ValueError):
    """What a metric takes is not there; the message says what to give."""


class Features:
    """What metrics take of a set of images in one network's layers.

    count: of the images, None where a file of statistics does not say.
    """

    name: str
    count: int | None

    def features(self, layer: str) -> Tensor:
        """[N, C]. Raises NotThere."""
        raise NotImplementedError

    def statistics(self, layer: str) -> dict[str, Any]:
        """mu [C], in the dtype of the features as torch-fidelity has it, and sigma [C, C] float64. Raises NotThere."""
        raise NotImplementedError


class ImageFeatures(Features):
    """Features of images, extracted at the first need; kept in a cache, where there is one, under a hash of the data.

    advance: told of the progress of an extraction.
    """

    def __init__(
        self, images: Images, extractor: Extractor, cache: Cache | None = None, advance: Advance = lambda *_: None
    ) -> None:
        self.name, self.count = images.name, len(images)
        self.images, self.extractor, self.cache, self.advance = images, extractor, cache, advance
        self._found: dict[str, Tensor] = {}
        self._statistics: dict[str, dict[str, Any]] = {}
        self._origin: dict[str, str] | None = None

    def features(self, layer: str) -> Tensor:
        key = self._key(layer, "features")
        if layer not in self._found:
            kept = None if key is None else self.cache.read(key)
            self._found[layer] = self._extract(layer) if kept is None else kept["features"]
        if key is not None and key not in self.cache:
            self.cache.write(key, {"features": self._found[layer]})
        return self._found[layer]

    def statistics(self, layer: str) -> dict[str, Any]:
        if len(self.images) < 2:
            raise NotThere(f"{self.name}: expected at least 2 images for a covariance, found {len(self.images)}")
        if layer not in self._statistics:
            key = self._key(layer, "statistics")
            kept = None if key is None else self.cache.read(key)
            if kept is None:
                found = self._found.get(layer)
                statistics = fid_features_to_statistics(self._extract(layer) if found is None else found)
                if key is not None:
                    self.cache.write(key, {name: torch.from_numpy(value) for name, value in statistics.items()})
            else:
                statistics = {name: kept[name].numpy() for name in ("mu", "sigma")}
            self._statistics[layer] = statistics
        return self._statistics[layer]

    def _extract(self, layer: str) -> Tensor:
        """All layers at once, since one costs as much as all."""
        done, total = 0, len(self.images)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.advance(f"{self.extractor.name}: {self.name}", done, total)

        self._found = self.extractor.features(self.images, advance)
        return self._found[layer]

    def _key(self, layer: str, what: str) -> str | None:
        if self.cache is None:
            return None
        if self._origin is None:
            self._origin = {"images": self.images.digest(), "extractor": self.extractor.digest()}
        return key_of({**self._origin, "layer": layer, "what": what})


class FileStatistics(Features):
    """Statistics of a file: an .npz with mu [C] and sigma [C, C], as FID's published ones, ADM's with mu_s and sigma_s
    too, or the bundled one. of_images: features of images in the same file, for what its statistics do not serve.

    Raises ValueError for statistics of no known network: another shape, width or type.
    """

    def __init__(self, path: Path, of_images: Features | None = None) -> None:
        self.path, self.name, self.of_images = path, str(path), of_images
        there = arrays_in(path)
        count = next((key for key in COUNTS if key in there), None)
        self.count = None if count is None else _whole_number(path, count)
        for names in dict.fromkeys(STATISTICS.values()):
            if set(names) <= set(there):
                self._check(names)

    def features(self, layer: str) -> Tensor:
        if self.of_images is None:
            raise NotThere(f"{self.name} holds statistics; give the reference's images")
        return self.of_images.features(layer)

    def statistics(self, layer: str) -> dict[str, Any]:
        reason = self.unfit(layer)
        if reason is not None:
            if self.of_images is not None:
                return self.of_images.statistics(layer)
            raise NotThere(reason)
        mu, sigma = (np.array(read_array(self.path, name)) for name in STATISTICS[layer])
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"{self.path}: expected finite statistics, found infinite or undefined values")
        return {"mu": mu.astype(np.float64), "sigma": sigma.astype(np.float64)}

    def _check(self, names: tuple[str, str]) -> None:
        """Raise ValueError where arrays are not the mean and the covariance of any layer's features."""
        mu, sigma = (read_array(self.path, name) for name in names)
        widths = sorted({WIDTHS[layer] for layer, own in STATISTICS.items() if own == names})
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape or len(mu) not in widths:
            wanted = f"{names[0]} [C] and {names[1]} [C, C] with C = {' or '.join(map(str, widths))}"
            raise ValueError(f"{self.path}: expected {wanted}, found {list(mu.shape)} and {list(sigma.shape)}")
        for name, array in zip(names, (mu, sigma), strict=True):
            if array.dtype.kind not in "fiu":
                raise ValueError(f"{self.path}: {name}: expected numbers, found {array.dtype}")

    def unfit(self, layer: str) -> str | None:
        """Why the file's statistics are not the layer's; None where they are."""
        names, there = STATISTICS.get(layer, ()), arrays_in(self.path)
        if not names or not set(names) <= set(there):
            return f"{self.name} holds {', '.join(there)}, expected {' and '.join(names) or 'images'}"
        width = len(read_array(self.path, names[0]))
        return None if width == WIDTHS[layer] else f"{self.name}: of {width} features, expected {WIDTHS[layer]}"


def _whole_number(path: Path, name: str) -> int:
    """An array of one number, as a count is stored."""
    found = read_array(path, name)
    if found.size != 1 or found.dtype.kind not in "iuf" or not float(found.item()).is_integer():
        raise ValueError(f"{path}: {name}: expected a number of images, found {found.dtype} {list(found.shape)}")
    return int(found.item())


def holds_statistics(path: Path) -> bool:
    """Whether an .npz has statistics of some layer."""
    there = set(arrays_in(path))
    return any(set(names) <= there for names in STATISTICS.values())


def frechet_distance(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The Fréchet distance of two statistics, by torch-fidelity; in float64 where their dtypes differ."""
    if first["mu"].dtype != second["mu"].dtype or first["sigma"].dtype != second["sigma"].dtype:
        first, second = ({k: np.asarray(v, np.float64) for k, v in s.items()} for s in (first, second))
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """(mean, standard deviation over the splits) of logits [N, classes], in torch-fidelity's random order."""
    found = isc_features_to_metric(logits, splits)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def kernel_distance(features: Tensor, reference: Tensor, subsets: int, subset_size: int) -> tuple[float, float]:
    """(mean, standard deviation over the subsets) of the squared kernel distance (KID). Raises NotThere for subsets
    of more images than there are."""
    fewest = min(len(features), len(reference))
    if subset_size > fewest:
        raise NotThere(f"subsets of {subset_size} images, and there are {fewest}; give a smaller size of subsets")
    options = {"kid_subsets": subsets, "kid_subset_size": subset_size, "verbose": False}
    found = kid_features_to_metric(features, reference, **options)
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def precision_recall(features: Tensor, reference: Tensor, neighborhood: int = 3) -> tuple[float, float]:
    """(share of images inside the reference's manifold, share of the reference inside the images').

    In torch-fidelity's blocks of 10,000 images, so that memory stays bounded. Raises NotThere for too few images.
    """
    if min(len(features), len(reference)) <= neighborhood:
        raise NotThere(f"{neighborhood} neighbours, and there are {min(len(features), len(reference))} images")
    options = {"prc_neighborhood": neighborhood, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(features, reference, **options)
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]
