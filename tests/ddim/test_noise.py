import pytest
import torch

from ddim.noise import ImageNoise

SHAPE = (3, 8, 8)


def draws(indices, seed=7, count=2, **kwargs):
    noise = ImageNoise(seed, indices, SHAPE, "cpu", **kwargs)
    return torch.stack([noise() for _ in range(count)])  # [count, N, C, H, W]


def test_noise_of_an_image_does_not_depend_on_its_batch():
    together = draws([0, 1, 2, 3])
    apart = torch.cat([draws([0]), draws([3, 1, 2])[:, [1, 2, 0]]], dim=1)
    assert torch.equal(together, apart)


def test_every_image_seed_and_call_has_its_own_noise():
    values = torch.cat([draws([0, 1]).flatten(0, 1), draws([0, 1], seed=8).flatten(0, 1)]).flatten(1)
    distances = torch.cdist(values, values) + 100 * torch.eye(len(values))
    assert distances.min() > 10  # independent normal vectors of 192 entries are about 20 apart


def test_noise_is_standard_normal():
    values = draws(range(64), count=4)
    assert values.mean().abs() < 0.02 and (values.var() - 1).abs() < 0.03  # 4 standard errors of 49152 draws


def test_precision_does_not_change_the_noise():
    assert torch.equal(draws([4], dtype=torch.float64), draws([4]).double())


def test_an_empty_batch_is_empty():
    assert draws([], count=1).shape == (1, 0, *SHAPE)


@pytest.mark.parametrize("seed, indices", [(-1, [0]), (0, [-2])])
def test_negative_seeds_are_refused(seed, indices):
    with pytest.raises(ValueError, match=f"negative.*seed {seed}"):
        ImageNoise(seed, indices, SHAPE, "cpu")
