import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from ldm.modules.distributions import DiagonalGaussianDistribution


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def moments(generator):
    return torch.randn(2, 3, 8, 4, 5, dtype=torch.float64, generator=generator)  # of two distributions


def reference(moments):
    mean, logvar = moments.chunk(2, dim=1)
    return Independent(Normal(mean, (logvar / 2).exp()), 3)


def test_divergence_from_the_standard_normal_and_from_another(moments):
    ours, other = (DiagonalGaussianDistribution(m) for m in moments)
    standard = reference(torch.zeros_like(moments[0]))
    assert torch.allclose(ours.kl(), kl_divergence(reference(moments[0]), standard), rtol=1e-12)
    assert torch.allclose(ours.kl(other), kl_divergence(reference(moments[0]), reference(moments[1])), rtol=1e-12)
    assert torch.allclose(ours.kl(ours), torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_negative_log_likelihood(moments, generator):
    sample = torch.randn(3, 4, 4, 5, dtype=torch.float64, generator=generator)
    ours = DiagonalGaussianDistribution(moments[0]).nll(sample)
    assert torch.allclose(ours, -reference(moments[0]).log_prob(sample), rtol=1e-12)


def test_samples_have_the_mean_and_standard_deviation_asked_for(generator):
    moments = torch.tensor([3.0, -1.0, math.log(4.0), math.log(0.25)]).reshape(1, 4, 1, 1).expand(1, 4, 200, 200)
    distribution = DiagonalGaussianDistribution(moments)
    sample = distribution.sample(generator)
    # 40,000 draws: the error of a mean is std/200, of a standard deviation std/283.
    assert torch.allclose(sample.mean((0, 2, 3)), torch.tensor([3.0, -1.0]), atol=0.05)
    assert torch.allclose(sample.std((0, 2, 3)), torch.tensor([2.0, 0.5]), atol=0.04)
    assert torch.equal(distribution.mode(), moments[:, :2])


def test_a_sample_depends_on_its_generator_or_noise_alone(moments):
    distribution = DiagonalGaussianDistribution(moments[0])
    first, second, other = (distribution.sample(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, second) and not torch.equal(first, other)
    noise = torch.ones(3, 4, 4, 5, dtype=torch.float64)
    assert torch.equal(distribution.sample(noise=noise), distribution.mean + distribution.std)
    for both_or_none in ({}, {"generator": torch.Generator(), "noise": noise}):
        with pytest.raises(ValueError, match="generator or its noise"):
            distribution.sample(**both_or_none)


def test_log_variances_are_clamped():
    moments = torch.tensor([0.0, 0.0, -1000.0, 1000.0]).reshape(1, 4, 1, 1)
    distribution = DiagonalGaussianDistribution(moments)
    assert distribution.logvar.flatten().tolist() == [-30.0, 20.0]
    assert distribution.std.flatten().tolist() == pytest.approx([math.exp(-15), math.exp(10)])
    assert distribution.kl().isfinite().all()


def test_a_point_is_its_mean(moments):
    point = DiagonalGaussianDistribution(moments[0], deterministic=True)
    assert torch.equal(point.sample(), point.mean) and not point.std.any()
    assert not point.kl().any() and point.kl().shape == (3,)


def test_moments_without_log_variances_are_refused():
    with pytest.raises(ValueError, match="found 3 channels"):
        DiagonalGaussianDistribution(torch.zeros(1, 3, 2, 2))
