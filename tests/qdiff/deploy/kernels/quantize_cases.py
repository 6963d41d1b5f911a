"""Codes of activations and of normalised activations, and their sums, against the definition."""

import pytest
import torch
import torch.nn.functional as F

from qdiff.deploy.kernels.codes import ActGrid
from qdiff.deploy.kernels.norms import group_norm_codes, layer_norm_codes
from qdiff.deploy.kernels.quantize import channel_sums, quantize
from qdiff.nn.grid import Grid
from qdiff.recipes.recipe import QuantSpec

SPECS = [QuantSpec(8), QuantSpec(8, "signed"), QuantSpec(4, "unsigned"), QuantSpec(2), QuantSpec(6, "unsigned_mid")]
TIES = 2e-3  # share of codes that may differ by one step where the last bit of a float32 crosses a tie


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.bits}")
@pytest.mark.parametrize("sets", [None, [1], [2, 0]], ids=str)
def test_codes_are_the_definitions(spec, sets, random_grid, centred_codes, generator, device):
    """To the last one, in 16 and 32 bits; ties and values far outside among them."""
    scale, zero = random_grid(spec, 3, generator)
    scale[0] = 0.25
    grid = ActGrid(Grid(scale, zero, spec)).to(device)
    x = torch.randn(2, 3, 5, 70, generator=generator) * 4
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.3, (x * 8).round() / 8, x)
    x[0, 0, 0, :4] = torch.tensor([1e30, -1e30, 3e6, -3e6])
    expected = centred_codes(x, scale, zero, spec, sets or [0])
    on_device = None if sets is None else torch.tensor(sets, device=device)
    stored_zero = grid.zero[torch.tensor(sets or [0])].view(-1, 1, 1, 1)
    codes, sums = quantize(x.to(device), grid, on_device, sums=True)
    assert torch.equal((codes - stored_zero).cpu().float(), expected)
    assert torch.equal(sums, codes.sum(-1).int()) and torch.equal(channel_sums(codes), sums)
    half = x.clamp(-100, 100).to(torch.bfloat16)
    codes = quantize(half.transpose(1, 2).to(device), grid, on_device).transpose(1, 2)
    assert torch.equal((codes - stored_zero).cpu().float(), centred_codes(half.float(), scale, zero, spec, sets or [0]))


def test_wide_grids_are_refused(device):
    with pytest.raises(ValueError, match="at most 8 bits, found 16"):
        quantize(torch.zeros(2, 3, device=device), ActGrid(Grid(torch.ones(1), torch.zeros(1), QuantSpec(16))), None)


@pytest.fixture
def assert_snapped(centred_codes):
    """(codes, y, grid, sets): int8 codes are those of the float result y, but for ties."""

    def check(codes, y, grid, sets):
        shape = (-1, *[1] * (y.dim() - 1))
        scale, zero = (values[[0] if sets is None else sets].view(shape) for values in (grid.scale, grid.zero))
        expected = (torch.round(y / scale) + zero).clamp(grid.qmin, grid.qmax)
        away = (codes - expected).abs()
        assert away.max() <= 1 and (away > 0).float().mean() <= TIES
        off_tie = ((y / scale) % 1 - 0.5).abs() > 1e-3
        assert not away[off_tie].any()

    return check


# Groups of one channel, of an odd number, of all; maps smaller and larger than a block of pixels.
@pytest.mark.parametrize(
    "channels, groups, shape", [(64, 32, (9, 9)), (96, 32, (1, 1)), (70, 2, (5, 31)), (130, 1, (7,))]
)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.cases("True-*", "False-70-2-shape2")
def test_group_norm(channels, groups, shape, silu, random_grid, generator, device, assert_snapped):
    spec = QuantSpec(8)
    grid = ActGrid(Grid(*random_grid(spec, 3, generator), spec)).to(device)
    sets = torch.tensor([2, 0], device=device)
    x = (torch.randn(2, *shape, channels, generator=generator) * 0.1 + 30).to(device)  # a mean that cancels
    weight, bias = torch.randn(2, channels, generator=generator).to(device)
    codes = group_norm_codes(x, groups, weight, bias, 1e-5, silu, grid, sets)
    exact = (t.double().movedim(-1, 1) for t in (x,))
    y = F.group_norm(*exact, groups, weight.double(), bias.double(), 1e-5).movedim(1, -1)
    y = F.silu(y) if silu else y
    # Statistics in float32 of values around 30 leave errors of 1e-5 in y, far below a step of the grid.
    scale = grid.scale[sets].view(-1, *[1] * (x.dim() - 1))
    zero = grid.zero[sets].view_as(scale)
    away = (codes - (torch.round(y / scale) + zero).clamp(grid.qmin, grid.qmax)).abs()
    assert away.max() <= 1 and (away > 0).float().mean() <= 2e-3


@pytest.mark.parametrize("channels", [1, 70, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layer_norm(channels, dtype, random_grid, generator, device, assert_snapped):
    spec = QuantSpec(8, "signed")
    grid = ActGrid(Grid(*random_grid(spec, 3, generator), spec)).to(device)
    x = torch.randn(2, 9, channels, generator=generator).to(device, dtype)
    weight, bias = torch.randn(2, channels, generator=generator).to(device, dtype)
    for sets in (None, torch.tensor([1], device=device), torch.tensor([0, 2], device=device)):
        codes = layer_norm_codes(x, weight, bias, 1e-5, grid, sets)
        y = F.layer_norm(x.float(), (channels,), weight.float(), bias.float(), 1e-5)
        assert_snapped(codes, y, grid, sets)


def test_a_row_that_no_program_holds_is_refused(device):
    grid = ActGrid(Grid(torch.ones(1), torch.zeros(1), QuantSpec(8)))
    ones = torch.ones(16385, device=device)
    with pytest.raises(ValueError, match="at most 16384 channels, found 16385"):
        layer_norm_codes(ones[None], ones, ones, 1e-5, grid, None)
