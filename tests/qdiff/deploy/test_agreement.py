"""What may run in place of a network: float noise is allowed for, other numbers are not."""

import pytest
import torch
from torch import nn

from qdiff.deploy.agreement import LIMIT, distances
from qdiff.deploy.convert import integer_network
from qdiff.nn.layers import QuantLayer
from qdiff.recipes.recipe import QuantSpec, Recipe
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

W8A8 = Recipe(
    "w8a8", QuantSpec(8, axis="out_channel"), QuantSpec(8), stages=(WeightRanges(RangeSpec()), ActivationRanges())
)


class Scaled(nn.Module):
    """A network whose answer is off by a share."""

    def __init__(self, network, share):
        super().__init__()
        self.network, self.share = network, share

    def forward(self, *arguments):
        return self.network(*arguments) * (1 + self.share)


@pytest.fixture
def batch(generator):
    return torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([950, 600, 300, 50])


@pytest.mark.parametrize("seed", range(5))
def test_the_limit_allows_for_codes_that_cross_ties(seed, quantized):
    """The integer reference sums in another order; which codes cross differs from batch to batch."""
    network = quantized(W8A8, 64)
    batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.tensor([950, 600, 300, 50])
    found = distances({"simulate": network, "integer": integer_network(network)}, batch)
    assert found["integer"] <= found[LIMIT] < 0.2


def test_distances_are_relative_and_leave_the_network_as_it_was(quantized, batch):
    network = quantized(W8A8, 64)
    expected = network(*batch)
    found = distances({"a": network, "same": network, "off": Scaled(network, 0.25)}, batch)
    assert found["same"] == 0 and found["off"] == pytest.approx(0.25) and list(found) == ["same", "off", LIMIT]
    assert torch.equal(network(*batch), expected)
    assert not any(m._forward_hooks for m in network.modules() if isinstance(m, QuantLayer))


def test_what_is_not_finite_is_within_no_limit(quantized, batch):
    network = quantized(W8A8, 64)
    found = distances({"a": network, "b": Scaled(network, float("nan"))}, batch)
    assert not found["b"] <= found[LIMIT]
