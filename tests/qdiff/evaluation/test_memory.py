"""LiveBytes against sizes known beforehand."""

import torch
from torch.utils.checkpoint import checkpoint

from qdiff.evaluation.memory import LiveBytes

SIZE = 1000 * 4  # bytes of the tensors below


def test_what_is_freed_is_no_longer_counted():
    x = torch.ones(1000)
    with LiveBytes() as meter:
        y = x + 1
        assert meter.live == meter.peak == SIZE
        z = y * 2
        assert meter.live == meter.peak == 2 * SIZE
        del y, z
        assert meter.live == 0 and meter.peak == 2 * SIZE


def test_views_and_changes_in_place_take_nothing():
    x = torch.ones(1000)
    with LiveBytes() as meter:
        x.view(10, 100).t().add_(1)
        assert meter.peak == 0


def test_a_graph_keeps_what_its_backward_needs():
    """Ten sines keep ten inputs; recomputed in backward, they keep one at a time."""
    x = torch.ones(1000, requires_grad=True)

    def sines(y):
        for _ in range(10):
            y = y.sin()
        return y

    with LiveBytes() as kept:
        sines(x).sum().backward()
    x.grad = None

    def recomputed(y):
        for _ in range(10):
            y = checkpoint(torch.sin, y, use_reentrant=False)
        return y

    with LiveBytes() as whole:
        checkpoint(recomputed, x, use_reentrant=False).sum().backward()
    assert kept.peak >= 10 * SIZE and whole.peak >= 2 * SIZE
    x.grad = None
    del x
    assert kept.live == whole.live == 0
