"""Bootstrap intervals: the closed forms, and that they cover as often as they say."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.metric_isc import isc_features_to_metric

from qdiff.evaluation.distances import frechet_distance
from qdiff.evaluation.intervals import (
    half_width,
    mean_half_width,
    resampled,
    resampled_frechet_distances,
    resampled_inception_scores,
    resampled_means,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_interval_of_a_mean_has_a_closed_form():
    values = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert mean_half_width(values) == pytest.approx(1.959964 * math.sqrt(0.75 * 0.25 / 4))
    drawn = half_width(resampled_means(values, 4000, generator()))
    assert drawn == pytest.approx(mean_half_width(values), rel=0.05)


def test_intervals_of_means_cover_as_often_as_they_say():
    samples = torch.randn(400, 100, generator=generator(3)).exp()
    inside = [abs(x.mean().item() - math.exp(0.5)) <= mean_half_width(x) for x in samples]
    assert 0.88 <= np.mean(inside) <= 0.97


@pytest.mark.parametrize(("count", "width"), [(60, 8), (12, 16)], ids=["more images", "fewer images than features"])
def test_resampled_distances_are_those_of_the_resamples(count, width):
    rng = generator(1)
    features = torch.randn(count, width, generator=rng, dtype=torch.float64) @ torch.randn(
        width, width, generator=rng, dtype=torch.float64
    )
    reference = fid_features_to_statistics(torch.randn(100, width, generator=rng, dtype=torch.float64) + 0.3)
    found = resampled_frechet_distances(features, reference, 5, generator(7))
    draws = []
    resampled(count, 5, generator(7), lambda indices: draws.append(indices) or 0.0)
    for value, indices in zip(found, draws, strict=True):
        expected = frechet_distance(fid_features_to_statistics(features[indices]), reference)
        assert value.item() == pytest.approx(expected, rel=1e-6)


def test_the_spread_of_distances_is_that_of_new_samples():
    """The mean of resampled distances is shifted, their spread is not."""
    width, count = 6, 300
    rng = generator(2)
    reference = {"mu": np.zeros(width), "sigma": np.eye(width)}
    samples = 1.2 * torch.randn(60, count, width, generator=rng, dtype=torch.float64) + 0.2
    new = [frechet_distance(fid_features_to_statistics(sample), reference) for sample in samples]
    spreads = [resampled_frechet_distances(s, reference, 100, generator(4)).std().item() for s in samples[:8]]
    assert np.mean(spreads) == pytest.approx(np.std(new), rel=0.25)


def test_resampled_inception_scores():
    logits = torch.randn(40, 5, generator=generator(5))
    found = resampled_inception_scores(logits, 1, 4, generator(6))
    indices = torch.randint(0, 40, (40,), generator=generator(6))
    expected = isc_features_to_metric(logits[indices], 1, shuffle=False)["inception_score_mean"]
    assert found[0].item() == expected and len(set(found.tolist())) == 4
