"""How far values of a sample of images may be from those of another sample: bootstrap standard errors.

Images are drawn with replacement and the value is taken anew, what it is compared with held fixed. Reported is
value ± 1.96 standard deviations of the resampled values. Their mean is not used: a Fréchet distance of a resample is
biased upwards once more by the finite count, while its spread is right (docs/protocol.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

NORMAL_95 = 1.959964  # standard deviations either side that hold 95 % of a normal distribution


def mean_half_width(values: Tensor) -> float:
    """Half of the 95 % interval of a mean of [N] values: the bootstrap's standard error, which has a closed form."""
    values = values.double()
    return NORMAL_95 * math.sqrt(values.var(correction=0).item() / len(values))


def half_width(resampled: Tensor) -> float:
    """Half of the 95 % interval of what was resampled [B]."""
    return NORMAL_95 * resampled.double().std().item()


def resampled(count: int, draws: int, generator: torch.Generator, value: Callable[[Tensor], float]) -> Tensor:
    """[draws] values of samples of `count` indices drawn with replacement; `value` takes indices [count]."""
    found = [value(torch.randint(count, (count,), generator=generator)) for _ in range(draws)]
    return torch.tensor(found, dtype=torch.float64)


def resampled_means(values: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """[draws] means of resamples of values [N], for what is a function of a mean."""
    values = values.double()
    return resampled(len(values), draws, generator, lambda indices: values[indices].mean().item())


def resampled_inception_scores(logits: Tensor, splits: int, draws: int, generator: torch.Generator) -> Tensor:
    """[draws] Inception scores of resampled logits [N, classes], by torch-fidelity."""

    def score(indices: Tensor) -> float:
        return isc_features_to_metric(logits[indices], splits, shuffle=False)[KEY_METRIC_ISC_MEAN]

    return resampled(len(logits), draws, generator, score)


def resampled_frechet_distances(
    features: Tensor, reference: dict[str, Any], draws: int, generator: torch.Generator
) -> Tensor:
    """[draws] Fréchet distances of resamples of features [N, C] to fixed statistics (mu [C], sigma [C, C]).

    With R the root of the reference's covariance, tr (Σ R²)^½ is the sum of the roots of the eigenvalues of the
    symmetric R Σ R: of the features times R, taken once, in C or N dimensions, whichever are fewer.
    """
    dtype = torch.float64 if features.shape[1] <= 512 else torch.float32  # wide ones are slow and need no more digits
    mu, sigma = (torch.from_numpy(np.asarray(reference[key], np.float64)) for key in ("mu", "sigma"))
    eigenvalues, axes = torch.linalg.eigh(sigma)
    root = (axes * eigenvalues.clamp(min=0).sqrt()) @ axes.T
    centred = features.double() - mu
    squares, turned, centred = centred.square().sum(1), (centred @ root).to(dtype), centred.to(dtype)
    count, trace = len(features), eigenvalues.sum().item()

    def distance(indices: Tensor) -> float:
        shift = centred[indices].mean(0)
        sample = turned[indices]
        sample = (sample - sample.mean(0)) / math.sqrt(count - 1)
        product = sample @ sample.T if count < sample.shape[1] else sample.T @ sample
        roots = torch.linalg.eigvalsh(product).double().clamp(min=0).sqrt().sum().item()
        squared_shift = shift.double().square().sum().item()
        spread = (squares[indices].sum().item() - count * squared_shift) / (count - 1)
        return squared_shift + spread + trace - 2 * roots

    return resampled(count, draws, generator, distance)
