"""Memory layouts of weights and activations, and window sums, against plain integer tensors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff.deploy.kernels.codes import MAX_DEPTH, ActGrid, KernelWeight
from qdiff.deploy.kernels.geometry import Geometry, windows
from qdiff.nn.grid import Grid
from qdiff.recipes.recipe import QuantSpec


@settings(max_examples=40)
@given(bits=st.integers(2, 8), kind=st.sampled_from(["affine", "signed"]), channels=st.integers(1, 9), data=st.data())
def test_a_weight_keeps_its_codes(bits, kind, channels, data):
    spec = QuantSpec(bits, kind, "out_channel")
    kernel = data.draw(st.sampled_from([(), (3,), (3, 3), (1, 2)]))
    zeros = st.integers(-3, 300) if kind == "affine" else st.just(0)
    zero = torch.tensor(data.draw(st.lists(zeros, min_size=4, max_size=4)))
    generator = torch.Generator().manual_seed(bits * channels)
    codes = torch.randint(spec.qmin, spec.qmax + 1, (4, channels, *kernel), generator=generator)
    scale = torch.rand(4, generator=generator)
    weight = KernelWeight.make(codes, Grid(scale, zero, spec))
    centred = codes - zero.view(-1, *[1] * (codes.dim() - 1))
    taps = centred.reshape(4, channels, *[1] * (4 - codes.dim()), *kernel).permute(0, 2, 3, 1)
    assert torch.equal(weight.centred().long(), taps)
    values = centred * scale.view(-1, *[1] * (codes.dim() - 1))
    assert torch.equal(weight.values().reshape(values.shape), values)
    stored = channels if bits > 4 else (channels + 1) // 2
    assert weight.codes.numel() * weight.codes.element_size() == taps[..., 0].numel() * stored


def test_codes_that_fit_a_byte_when_centred_leave_no_zero_point():
    spec = QuantSpec(8, axis="out_channel")
    codes = torch.arange(256).view(1, 256)
    assert KernelWeight.make(codes, Grid(torch.ones(1), torch.tensor([128]), spec)).zero is None
    assert KernelWeight.make(codes, Grid(torch.ones(1), torch.tensor([127]), spec)).zero is not None


def test_sums_that_may_exceed_32_bits_are_refused():
    codes = torch.zeros(1, MAX_DEPTH + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"at most {MAX_DEPTH} weights per output, found {MAX_DEPTH + 1}"):
        KernelWeight.make(codes, Grid(torch.ones(1), torch.zeros(1), QuantSpec(8)))


@pytest.mark.parametrize("kind", ["affine", "signed", "unsigned"])
@pytest.mark.parametrize("bits", [2, 7, 8, 12, 16])
def test_stored_activation_codes_are_signed_and_no_wider_than_the_grid(bits, kind):
    spec = QuantSpec(bits, kind)
    zero = torch.tensor([0, 3 if kind == "affine" else 0])
    grid = ActGrid(Grid(torch.ones(2), zero, spec))
    assert grid.qmin >= -(2 ** (max(bits, 8) - 1)) and grid.qmax < 2 ** (max(bits, 8) - 1)
    assert torch.equal(grid.zero - grid.qmin, zero.int() - spec.qmin)


def test_a_grid_per_channel_is_refused():
    with pytest.raises(ValueError, match=r"one scale per parameter set, found \[2, 3\]"):
        ActGrid(Grid(torch.ones(2, 3), torch.zeros(2, 3), QuantSpec(4, axis="in_channel")))


@pytest.mark.parametrize("geometry", [Geometry(), Geometry((2, 1), (1, 2)), Geometry((1, 2), (2, 1), (2, 1))], ids=str)
@pytest.mark.parametrize("image", [(1, 1), (2, 5), (7, 6)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3)], ids=str)
def test_window_sums_are_a_convolution_of_ones(geometry, image, kernel):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (3, 5, *kernel), generator=generator)
    zero = torch.tensor([0, 7, 15])
    weight = KernelWeight.make(codes, Grid(torch.ones(3), zero, QuantSpec(4, axis="out_channel")))
    try:
        out = geometry.size(kernel, image)
    except ValueError:
        pytest.skip("the image is smaller than the kernel")
    ones = torch.ones(1, 5, *image).double()
    centred = (codes - zero.view(-1, 1, 1, 1)).double()
    expected = F.conv2d(ones, centred, None, geometry.stride, geometry.padding, geometry.dilation)[0]
    found = windows(weight, geometry, image)
    assert torch.equal(found.sums[found.classes].T.reshape(3, *out).double(), expected)
    assert len(found.sums) <= len(found.classes)
