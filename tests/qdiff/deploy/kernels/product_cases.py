"""Products of codes, exact against float64 convolutions of whole numbers; their epilogues; weights alone in codes."""

from itertools import cycle

import pytest
import torch
import torch.nn.functional as F

from qdiff.deploy.kernels import product
from qdiff.deploy.kernels.codes import ActGrid, KernelWeight
from qdiff.deploy.kernels.geometry import Geometry
from qdiff.deploy.kernels.product import Epilogue, integer_product, integer_sums, weight_only_product
from qdiff.deploy.kernels.quantize import quantize
from qdiff.deploy.kernels.tuning import Config
from qdiff.nn.grid import Grid
from qdiff.recipes.recipe import QuantSpec

# (kernel, geometry); sizes below are none that tiles divide.
FORMS = [
    ((3, 3), Geometry(padding=(1, 1))),
    ((1, 1), Geometry()),
    ((3, 3), Geometry(stride=(2, 2))),
    ((3, 3), Geometry((2, 2), (1, 1))),
    ((1, 3), Geometry(padding=(0, 1))),
    ((3, 2), Geometry((1, 2), (2, 1), (2, 1))),
]
BITS = [(8, 8), (4, 8), (2, 3), (3, 2), (5, 4), (6, 7), (7, 6), (4, 4), (8, 5)]
KINDS = [("affine", "affine"), ("signed", "affine"), ("affine", "signed"), ("signed", "signed")]
CASES = [(*bits, *kinds, *form) for bits, kinds, form in zip(BITS, cycle(KINDS), cycle(FORMS), strict=False)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(product, "INTERPRETED_CONFIG", Config(32, 16, 32))
    monkeypatch.setattr(product, "GROUP_ROWS", 2)


@pytest.fixture
def case(random_grid, random_codes, centred_codes, device):
    """(weight bits and kind, activation bits and kind, kernel, sets) -> weight, grid, stored codes, and the centred
    codes of both sides as float64 in the order of F.conv2d."""

    def make(w_bits, a_bits, w_kind, a_kind, kernel, sets=None, image=(4, 5), channels=35, outputs=21):
        generator = torch.Generator().manual_seed(w_bits * 8 + a_bits)
        w_spec, a_spec = QuantSpec(w_bits, w_kind, "out_channel"), QuantSpec(a_bits, a_kind)
        codes = random_codes(w_spec, (outputs, channels, *kernel), generator)
        w_scale, w_zero = random_grid(w_spec, outputs, generator, ends=w_bits % 2 == 0)
        scale, zero = random_grid(a_spec, 3, generator, ends=a_bits % 2 == 0)
        x = torch.randn(2, *image, channels, generator=generator)
        weight = KernelWeight.make(codes, Grid(w_scale, w_zero, w_spec)).to(device)
        grid = ActGrid(Grid(scale, zero, a_spec)).to(device)
        centred = centred_codes(x, scale, zero, a_spec, [0] if sets is None else sets)
        sets = None if sets is None else torch.tensor(sets, device=device)
        stored = quantize(x.to(device), grid, sets)
        whole = (codes - w_zero.view(-1, *[1] * (codes.dim() - 1))).double()
        return weight, grid, sets, stored, centred.double().permute(0, 3, 1, 2), whole

    return make


def convolve(a, w, geometry):
    return F.conv2d(a, w, None, geometry.stride, geometry.padding, geometry.dilation).permute(0, 2, 3, 1)


@pytest.mark.parametrize("w_bits, a_bits, w_kind, a_kind, kernel, geometry", CASES)
def test_sums_are_exact(case, w_bits, a_bits, w_kind, a_kind, kernel, geometry):
    sets = [None, [2, 0], [1]][w_bits % 3]
    weight, grid, sets, stored, a, w = case(w_bits, a_bits, w_kind, a_kind, kernel, sets)
    sums = integer_sums(stored, weight, grid, sets, geometry)
    assert torch.equal(sums.cpu().double(), convolve(a, w, geometry))


@pytest.mark.parametrize("bits", [3, 8])
def test_sums_of_a_channel_slice_and_of_rows(case, bits):
    """One side of a split reads some of the channels in memory; a linear layer's rows are one line of pixels."""
    weight, grid, sets, stored, a, w = case(bits, 8, "affine", "affine", (1, 1), [2, 0], channels=11)
    joined = torch.cat([torch.full_like(stored, 55), stored], -1)[..., 11:]
    assert torch.equal(integer_sums(joined, weight, grid, sets, Geometry()).cpu().double(), convolve(a, w, Geometry()))
    weight, grid, sets, stored, a, w = case(bits, 8, "affine", "affine", (), [2, 0], image=(1, 9), channels=40)
    assert torch.equal(
        integer_sums(stored, weight, grid, sets, Geometry()).cpu().double(),
        F.linear(a.permute(0, 2, 3, 1), w),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.cases("torch.float16", "torch.float32")
def test_the_epilogue(case, dtype, device):
    """Scales per sample and output channel, bias, and what is added: of the output's shape in either memory order, or
    per sample and channel."""
    geometry = Geometry()
    weight, grid, sets, stored, a, w = case(4, 8, "affine", "affine", (1, 1), [2, 0])
    sums = convolve(a, w, geometry)
    scale = grid.scale[sets].view(-1, 1, 1, 1) * weight.scale
    bias = torch.randn(weight.outputs).to(device)
    full = torch.randn(sums.shape).to(device, dtype)
    others = [None, full, full.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), full[:, :1, :1], full[:1, :1, :1]]
    for other in others:
        y = integer_product(stored, weight, grid, sets, geometry, Epilogue(dtype, bias, other))
        expected = (sums.float().to(device) * scale + bias + (0 if other is None else other.float())).to(dtype)
        assert y.dtype == dtype and y.is_contiguous()
        torch.testing.assert_close(y, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("bits, kind", [(8, "affine"), (8, "signed"), (4, "affine"), (3, "signed")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)  # bfloat16 products are not interpreted
@pytest.mark.cases("torch.float16-8-affine", "torch.float32-3-signed")
def test_weights_alone_in_codes(case, bits, kind, dtype, device):
    geometry = Geometry(padding=(1, 1))
    weight, *_, w = case(bits, 8, kind, "affine", (3, 3))
    x = torch.randn(2, 4, 5, 35).to(device, dtype)
    bias = torch.randn(weight.outputs).to(device)
    y = weight_only_product(x, weight, geometry, Epilogue(torch.float32, bias))
    scaled = w * weight.scale.cpu().double().view(-1, 1, 1, 1)
    expected = convolve(x.cpu().double().permute(0, 3, 1, 2), scaled, geometry) + bias.cpu().double()
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=2e-5)


def test_other_widths_are_refused(case):
    weight, grid, sets, stored, *_ = case(4, 8, "signed", "signed", (1, 1))
    with pytest.raises(ValueError, match="the weight takes 35 channels, found 34"):
        integer_sums(stored[..., :34], weight, grid, sets, Geometry())
