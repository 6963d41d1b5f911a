"""Views as bookkeeping: any sequence of reshapes and transposes shows the same elements as torch's own."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from qdiff.deploy.onnx.views import Layout


def shown(layout, x):
    """The elements of x that the view shows."""
    order = [axis for dim in layout.dims for axis in dim]
    rest = [axis for axis in range(len(layout.sizes)) if axis not in order]
    return x.reshape(layout.sizes).permute(*order, *rest).reshape(layout.shape)


@st.composite
def split(draw, size):
    """Factors of a size."""
    factors = []
    for prime in (2, 3, 5, 7):
        while size % prime == 0:
            factors.append(prime)
            size //= prime
    draw(st.randoms(use_true_random=False)).shuffle(factors)
    return factors or [1]


@given(st.data())
def test_reshapes_and_transposes_are_torchs(data):
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=4))
    x = torch.arange(math.prod(shape)).reshape(shape)
    layout, expected = Layout.whole(shape), x
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(expected.dim())))
            layout, expected = layout.permute(order), expected.permute(order)
            continue
        sizes = [factor for size in expected.shape for factor in data.draw(split(size))]
        cuts = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
        target, current = [], 1
        for size, cut in zip(sizes, cuts, strict=True):
            current *= size
            if cut:
                target.append(current)
                current = 1
        target.append(current)
        try:
            layout = layout.reshape(target)
        except ValueError:
            return  # an axis of parts of two others that do not lie one behind the other
        expected = expected.reshape(target)
    assert layout.shape == tuple(expected.shape)
    assert torch.equal(shown(layout, x), expected)


def test_cut_axes_are_found_again():
    layout = Layout.whole((2, 12, 5)).reshape((2, 3, 4, 5)).permute((0, 3, 2, 1))
    assert layout.sizes == (2, 3, 4, 5) and layout.dims == ((0,), (3,), (2,), (1,))
    assert layout.pieces_of((2, 12, 5)) == [(0,), (1, 2), (3,)]
    assert not layout.is_whole and Layout.whole((2, 12)).is_whole


@pytest.mark.parametrize("shape", [(5,), (2, 2), (4, 3)])
def test_a_shape_of_other_elements_is_refused(shape):
    with pytest.raises(ValueError, match="no view of shape"):
        Layout.whole((6,)).reshape(shape)
