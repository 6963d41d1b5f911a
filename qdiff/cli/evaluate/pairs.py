"""The metrics of evaluate.py that take images one by one: beside the float model's, or beside their prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qdiff.cli.evaluate.metrics import MetricOptions, Score, Subject, draws_of, generator_of
from qdiff.evaluation.clip_score import ClipScore
from qdiff.evaluation.distances import NotThere
from qdiff.evaluation.features import IMAGE_SHAPE
from qdiff.evaluation.intervals import half_width, mean_half_width, resampled_means
from qdiff.evaluation.pairs import few
from qdiff.evaluation.perceptual import CIFAR10_METRIC, LPIPS_FILES, Cifar10Distance, Lpips, lpips_folder
from qdiff.evaluation.prompts import class_of_prompt, named_classes
from qdiff.evaluation.similarity import SSIM_WINDOW, decibels, squared_errors, ssim
from qdiff.utils.files import has_bundled_models

PAIRED = ("psnr", "ssim", "lpips", "perceptual")
PROMPTED = ("clip", "accuracy")
BATCH = 250  # images of both sets compared at once
LABELS = {
    "ssim": "SSIM",
    "lpips": "LPIPS (VGG16)",
    "perceptual": CIFAR10_METRIC,
    "accuracy": "prompt's class named",
}

Measure = Callable[[Tensor, Tensor], Tensor]  # (images, float images), uint8 [N, 3, H, W] each -> a value per pair


@dataclass
class Comparer:
    """Measures subjects image by image with the flags' tools, which are made once."""

    options: MetricOptions
    device: torch.device
    _tools: dict[str, Any] = field(default_factory=dict)

    def scores(self, subject: Subject) -> tuple[list[Score], dict[str, str]]:
        """(the scores, metric -> why it is left out)."""
        measures: dict[str, Measure] = {}
        found, left_out = [], {}
        for name in (name for name in PAIRED if name in self.options.metrics):
            try:
                measures[name] = self._measure(name, subject)
            except NotThere as reason:
                left_out[name] = str(reason)
        for name, values in _values(measures, subject).items():
            found += self._paired_scores(name, values, subject.reference.name)
        for name in (name for name in PROMPTED if name in self.options.metrics):
            try:
                values = self._prompted(name, subject)
                found.append(Score(name, self._label(name), values.mean().item(), self._width(values), "prompts"))
            except NotThere as reason:
                left_out[name] = str(reason)
        return found, left_out

    def _measure(self, name: str, subject: Subject) -> Measure:
        images, reference = subject.images, subject.reference
        if reference is None:
            raise NotThere("no float images (--float)")
        alone = [images.names[index] for index in subject.pairs.alone]
        if alone or images.shape != reference.shape:
            found = " and ".join(f"{len(x)} of {x.shape[2]}x{x.shape[1]}" for x in (images, reference))
            missing = f"; no float image of the number or name of {few(alone)}" * bool(alone)
            raise NotThere(f"images and float images make no pairs: {found}{missing}")
        if name == "psnr":
            return lambda a, b: squared_errors(a.double() / 255, b.double() / 255, False)
        if name == "ssim":
            if min(images.shape[1:]) < SSIM_WINDOW:
                raise NotThere(f"SSIM takes images of at least {SSIM_WINDOW} pixels a side")
            return ssim
        if name == "perceptual":
            if images.shape != IMAGE_SHAPE:
                raise NotThere(f"CIFAR-10 features take images of 32x32, found {images.shape[2]}x{images.shape[1]}")
            return self._network(name, Cifar10Distance)
        folder = lpips_folder(self.options.lpips)
        if folder is None:
            raise NotThere(f"no LPIPS weights, {' and '.join(LPIPS_FILES)} (--lpips DIR)")
        return self._network(name, lambda: Lpips(folder))

    def _network(self, name: str, make: Callable[[], Any]) -> Measure:
        """A network that takes pairs, on its device."""
        network = self._tool(name, lambda: make().to(self.device))
        return lambda a, b: network(a.to(self.device), b.to(self.device))

    def _tool(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._tools:
            try:
                self._tools[name] = make()
            except FileNotFoundError as error:
                if has_bundled_models():
                    raise
                raise NotThere("its network is in the repository's folder models") from error
        return self._tools[name]

    def _paired_scores(self, name: str, values: Tensor, against: str) -> list[Score]:
        """Scores of a value per pair; for PSNR those are mean squared errors."""
        if name != "psnr":
            return [Score(name, self._label(name), values.mean().item(), self._width(values), against)]
        per_image, draws, width = decibels(values), draws_of(self.options), None
        pooled, mean = decibels(values.mean()).item(), per_image.mean().item()
        if draws > 1 and math.isfinite(pooled):
            width = half_width(decibels(resampled_means(values, draws, generator_of(self.options))))
        identical = int((values == 0).sum())
        note = f"{identical} of {len(values)} images identical" if identical else None
        mean_width = self._width(per_image) if math.isfinite(mean) else None
        return [
            Score("psnr", "PSNR of the mean error (dB)", finite(pooled), finite(width), against, note),
            Score("psnr_mean", "mean PSNR of images (dB)", finite(mean), mean_width, against, note),
        ]

    def _width(self, values: Tensor) -> float | None:
        return None if self.options.bootstrap == 0 or len(values) < 2 else mean_half_width(values)

    def _label(self, name: str) -> str:
        return f"CLIP score ({self.options.clip.name})" if name == "clip" else LABELS[name]

    def _prompted(self, name: str, subject: Subject) -> Tensor:
        """[N] values of images with their prompts."""
        images, prompts = subject.images, subject.prompts
        if prompts is None:
            raise NotThere("no prompts (--prompts FILE, or a run's folder of txt2img.py)")
        if len(prompts) != len(images):
            raise NotThere(f"{len(images)} images and {len(prompts)} prompts")
        if name == "accuracy":
            return _named(subject)
        if self.options.clip is None:
            raise NotThere("no CLIP model (--clip DIR)")
        clip, size = self._tool(name, lambda: ClipScore(self.options.clip, self.device)), self.options.batch_size
        batches = enumerate(images.batches(size))
        return torch.cat([clip(batch, prompts[i * size : i * size + len(batch)]) for i, batch in batches])


def _values(measures: dict[str, Measure], subject: Subject) -> dict[str, Tensor]:
    """Metric -> [N] values, from one pass over both sets, in the order of the images' names."""
    if not measures:
        return {}
    found: dict[str, list[Tensor]] = {name: [] for name in measures}
    partners = subject.pairs.partners
    pairs = zip(subject.images.batches(BATCH), subject.reference.batches(BATCH, partners), strict=True)
    with tqdm(total=len(subject.images), desc="pairs", unit="image", dynamic_ncols=True) as bar:
        for images, reference in pairs:
            for name, measure in measures.items():
                found[name].append(measure(images, reference).cpu())
            bar.update(len(images))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _named(subject: Subject) -> Tensor:
    """[N]: 1 where the bundled classifier names the class of an image's prompt, else 0."""
    if subject.images.shape != IMAGE_SHAPE:
        raise NotThere("the bundled classifier takes images of 32x32")
    try:
        wanted = torch.tensor([class_of_prompt(prompt) for prompt in subject.prompts])
    except ValueError as error:
        raise NotThere(str(error)) from error
    named = torch.cat([named_classes(batch) for batch in subject.images.batches(BATCH)])
    return (named == wanted).double()


def finite(value: float | None) -> float | None:
    """The value, or None for infinite and undefined ones, which JSON has not."""
    return value if value is not None and math.isfinite(value) else None
