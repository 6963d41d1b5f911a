"""The metrics of evaluate.py that compare features of sets of images, with what they take: weights, references."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from qdiff.cli.parser import Options
from qdiff.evaluation.cache import Cache
from qdiff.evaluation.distances import (
    Features,
    FileStatistics,
    ImageFeatures,
    NotThere,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from qdiff.evaluation.extractors import (
    CIFAR10,
    CIFAR10_LAYER,
    INCEPTION,
    LOGITS,
    POOLED,
    SPATIAL,
    VGG,
    VGG_LAYER,
    WIDTHS,
    Extractor,
    found_weights,
)
from qdiff.evaluation.features import IMAGE_SHAPE, models_folder
from qdiff.evaluation.images import Images
from qdiff.evaluation.intervals import (
    half_width,
    mean_half_width,
    resampled_frechet_distances,
    resampled_inception_scores,
)
from qdiff.evaluation.pairs import Pairs, pair_up
from qdiff.evaluation.table import FD_NAME
from qdiff.utils.files import has_bundled_models

NARROW = 512  # features up to which resampling is cheap
DRAWS, WIDE_DRAWS = 100, 20  # resamples by default, of narrow features and of wide ones
REFERENCE, FLOAT = "reference", "float"


@dataclass(frozen=True)
class Metric:
    """A metric of features: the network and layer that it takes, and what it compares with, if anything."""

    name: str
    label: str
    network: str
    layer: str
    against: str | None
    kind: str  # of KINDS


METRICS = {
    metric.name: metric
    for metric in (
        Metric("fid", "FID", INCEPTION, POOLED, REFERENCE, "frechet"),
        Metric("fid_float", "FID to float", INCEPTION, POOLED, FLOAT, "frechet"),
        Metric("sfid", "sFID", INCEPTION, SPATIAL, REFERENCE, "frechet"),
        Metric("is", "IS", INCEPTION, LOGITS, None, "score"),
        Metric("kid", "KID", INCEPTION, POOLED, REFERENCE, "kernel"),
        Metric("prc", "VGG16", VGG, VGG_LAYER, REFERENCE, "manifolds"),
        Metric("prc_inception", "Inception", INCEPTION, POOLED, REFERENCE, "manifolds"),
        Metric("fd", FD_NAME, CIFAR10, CIFAR10_LAYER, REFERENCE, "frechet"),
        Metric("fd_float", "FD to float (CIFAR-10 features)", CIFAR10, CIFAR10_LAYER, FLOAT, "frechet"),
        Metric("kid_cifar10", "KD (CIFAR-10 features)", CIFAR10, CIFAR10_LAYER, REFERENCE, "kernel"),
        Metric("prc_cifar10", "CIFAR-10 features", CIFAR10, CIFAR10_LAYER, REFERENCE, "manifolds"),
    )
}
FLAGS = {INCEPTION: "--inception", VGG: "--vgg"}
CALLED = {INCEPTION: "Inception", VGG: "VGG16"}


@dataclass(frozen=True)
class MetricOptions(Options):
    """What evaluate.py's flags say about its metrics, each under the flag's name."""

    metrics: Sequence[str] = ()
    bootstrap: int | None = None
    seed: int = 0
    inception: Path | None = None
    vgg: Path | None = None
    lpips: Path | None = None
    clip: Path | None = None
    batch_size: int = 64
    isc_splits: int = 10
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    prc_neighborhood: int = 3


@dataclass(frozen=True)
class Score:
    """A number, half of its 95 % interval where there is one, what it was taken against, and what else to know."""

    metric: str
    label: str
    value: float | None
    half_width: float | None = None
    against: str | None = None
    note: str | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """Images to judge, the float model's of the same seeds, and a prompt for each; None where there are none."""

    images: Images
    reference: Images | None = None  # float images
    prompts: tuple[str, ...] | None = None

    @cached_property
    def pairs(self) -> Pairs:
        """Which float image is the partner of which image."""
        return pair_up(self.images.names, self.reference.names)


@dataclass
class Judge:
    """Measures subjects by their features; what references take is made once.

    reference: images, or a file of statistics, or None; reference_images: those in the file of statistics. Bars show
    the progress of what takes long.
    """

    options: MetricOptions
    device: torch.device
    reference: Images | FileStatistics | None = None
    cache: Cache | None = None
    reference_images: Images | None = None
    _features: dict[tuple[int, str], ImageFeatures] = field(default_factory=dict)
    _bar: Bar = field(default_factory=lambda: Bar())

    def scores(self, subject: Subject) -> tuple[list[Score], dict[str, str]]:
        """(the scores, metric -> why it is left out)."""
        found, left_out = [], {}
        for name in self.options.metrics:
            try:
                if name in METRICS:
                    found += self._of_features(METRICS[name], subject)
            except NotThere as reason:
                left_out[name] = str(reason)
            finally:
                self._bar.close()
        for key in [key for key in self._features if key[0] == id(subject.images)]:
            del self._features[key]  # what is judged is judged once; references stay
        return found, left_out

    def weights(self) -> dict[str, str]:
        """Network -> its file of weights, of those that are there."""
        found = {}
        for metric in (METRICS[name] for name in self.options.metrics if name in METRICS):
            with contextlib.suppress(NotThere):
                found[metric.network] = str(self._extractor(metric.network).weights)
        return found

    def _of_features(self, metric: Metric, subject: Subject) -> list[Score]:
        other = None if metric.against is None else self._other(metric, subject)
        own = self._image_features(subject.images, metric.network, cached=False)
        return KINDS[metric.kind](self, metric, own, other)

    def _other(self, metric: Metric, subject: Subject) -> Features:
        """What a metric compares with."""
        if metric.against == FLOAT:
            if subject.reference is None:
                raise NotThere("no float images (--float)")
            return self._image_features(subject.reference, metric.network)
        if isinstance(self.reference, Images):
            return self._image_features(self.reference, metric.network)
        self._extractor(metric.network)  # without weights, that is the reason
        if self.reference_images is not None:
            return FileStatistics(self.reference.path, self._image_features(self.reference_images, metric.network))
        if metric.network == CIFAR10 and self.reference is None:
            bundled = FileStatistics(models_folder() / CIFAR10 / "train_statistics.npz")
            bundled.name = "bundled statistics"
            return bundled
        if self.reference is None:
            raise NotThere("no reference (--reference)")
        return self.reference

    def _image_features(self, images: Images, network: str, cached: bool = True) -> ImageFeatures:
        extractor = self._extractor(network)
        if network == CIFAR10 and images.shape != IMAGE_SHAPE:
            _, height, width = images.shape
            raise NotThere(f"CIFAR-10 features take images of 32x32, found {width}x{height}")
        key = id(images), network
        if key not in self._features:
            self._features[key] = ImageFeatures(images, extractor, self.cache if cached else None, self._bar)
        return self._features[key]

    def _extractor(self, network: str) -> Extractor:
        """A network with all layers that the chosen metrics take. Raises NotThere without its weights."""
        if network == CIFAR10 and not has_bundled_models():
            raise NotThere("no bundled CIFAR-10 features: they are in the repository's folder models")
        given = {INCEPTION: self.options.inception, VGG: self.options.vgg}.get(network)
        weights = found_weights(network) if given is None else given
        if weights is None:
            raise NotThere(f"no {CALLED[network]} weights ({FLAGS[network]}, or once --download)")
        wanted = (METRICS[name] for name in self.options.metrics if name in METRICS)
        layers = dict.fromkeys(metric.layer for metric in wanted if metric.network == network)
        return Extractor(network, tuple(layers), weights, self.device, self.options.batch_size)

    def _frechet(self, metric: Metric, own: ImageFeatures, other: Features) -> list[Score]:
        statistics = other.statistics(metric.layer)
        # Features first: statistics alone would forget them, and the interval takes them.
        features = own.features(metric.layer)
        value = frechet_distance(own.statistics(metric.layer), statistics)
        draws, width = draws_of(self.options, WIDTHS[metric.layer]), None
        if draws > 1:
            width = half_width(resampled_frechet_distances(features, statistics, draws, generator_of(self.options)))
        count = "" if other.count is None else f"{other.count} images"
        return [Score(metric.name, metric.label, value, width, other.name, count or None)]

    def _score(self, metric: Metric, own: ImageFeatures, other: None) -> list[Score]:
        logits, splits = own.features(metric.layer), self.options.isc_splits
        if len(logits) < splits:
            raise NotThere(f"{splits} splits, and there are {len(logits)} images; give --isc_splits")
        value, spread = inception_score(logits, splits)
        draws, width = draws_of(self.options), None
        if draws > 1:
            width = half_width(resampled_inception_scores(logits, splits, draws, generator_of(self.options)))
        return [Score(metric.name, metric.label, value, width, note=f"std of {splits} splits {spread:.6g}")]

    def _kernel(self, metric: Metric, own: ImageFeatures, other: Features) -> list[Score]:
        subsets, size = self.options.kid_subsets, self.options.kid_subset_size
        reference = other.features(metric.layer)
        value, spread = kernel_distance(own.features(metric.layer), reference, subsets, size)
        note = f"std of {subsets} subsets of {size} {spread:.6g}"
        return [Score(metric.name, metric.label, value, None, other.name, note)]

    def _manifolds(self, metric: Metric, own: ImageFeatures, other: Features) -> list[Score]:
        reference, neighbours = other.features(metric.layer), self.options.prc_neighborhood
        features = own.features(metric.layer)
        found = precision_recall(features, reference, neighbours)
        scores = []
        for what, share, count in zip(("precision", "recall"), found, (len(features), len(reference)), strict=True):
            width = None if self.options.bootstrap == 0 else mean_half_width(_zeros_and_ones(share, count))
            label, note = f"{what} ({metric.label})", f"{neighbours} neighbours"
            scores.append(Score(f"{what}{metric.name.removeprefix('prc')}", label, share, width, other.name, note))
        return scores


KINDS = {"frechet": Judge._frechet, "score": Judge._score, "kernel": Judge._kernel, "manifolds": Judge._manifolds}


class Bar:
    """A progress bar of an extraction."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, desc="features", unit="image", dynamic_ncols=True)
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        """End its line on the screen, also where an error ends the extraction."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _zeros_and_ones(share: float, count: int) -> Tensor:
    """[count]: as many ones as the share says."""
    return (torch.arange(count) < round(share * count)).double()


def draws_of(options: MetricOptions, width: int = 1) -> int:
    """Resamples for an interval, of features of a width."""
    if options.bootstrap is not None:
        return options.bootstrap
    return DRAWS if width <= NARROW else WIDE_DRAWS


def generator_of(options: MetricOptions) -> torch.Generator:
    """The same draws for every metric and subject."""
    return torch.Generator().manual_seed(options.seed)
