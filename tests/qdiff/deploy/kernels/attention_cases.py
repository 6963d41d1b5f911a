"""Fused integer attention against the simulation's formula on snapped operands in float64."""

import pytest
import torch

from qdiff.deploy.kernels import attention
from qdiff.deploy.kernels.attention import Grids, integer_attention
from qdiff.deploy.kernels.codes import ActGrid
from qdiff.deploy.kernels.tuning import Config
from qdiff.nn.grid import Grid
from qdiff.recipes.recipe import QuantSpec

UNSIGNED = QuantSpec(8, "unsigned")
CASES = {  # operands' grid, the softmax output's, (queries, keys, channels, channels of v, heads)
    "text": (QuantSpec(8), UNSIGNED, (20, 77, 24, 24, 2)),
    "signed": (QuantSpec(8, "signed"), UNSIGNED, (33, 40, 40, 40, 2)),
    "16 bits": (QuantSpec(8), QuantSpec(16, "unsigned"), (20, 70, 64, 48, 1)),
    "16 signed bits": (QuantSpec(8, "signed"), QuantSpec(16, "signed"), (5, 32, 8, 8, 1)),
    "affine": (QuantSpec(8), QuantSpec(8), (5, 9, 8, 12, 3)),
    "12 affine bits": (QuantSpec(6), QuantSpec(12), (5, 33, 8, 8, 1)),
    "4 bits": (QuantSpec(4), QuantSpec(4, "unsigned"), (17, 50, 33, 8, 1)),
    "one key": (QuantSpec(8), UNSIGNED, (3, 1, 8, 8, 2)),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention, "INTERPRETED_CONFIG", Config(16, 32, 32))


@pytest.mark.parametrize("spec, w_spec, sizes", CASES.values(), ids=CASES)
def test_the_simulation(spec, w_spec, sizes, random_grid, centred_codes, generator, device):
    queries, keys, channels, values, heads = sizes
    sets = None if queries == 20 else [1, 0]
    grids, tables = {}, {}
    for operand in "qkv":
        grids[operand] = spec, *random_grid(spec, 2, generator)
    zero = torch.tensor([0, 3 if w_spec.kind == "affine" else 0])
    grids["w"] = w_spec, torch.tensor([1.0, 0.6]) / w_spec.qmax, zero
    for operand, (own, scale, zero) in grids.items():
        tables[operand] = ActGrid(Grid(scale, zero, own)).to(device)
    shapes = [(queries, channels), (keys, channels), (keys, values)]
    q, k, v = (torch.randn(2, n, heads, d, generator=generator).transpose(1, 2) for n, d in shapes)
    on_device = None if sets is None else torch.tensor(sets, device=device)
    operand_scale, score_scale = 0.5, 1.7
    out = integer_attention(*(x.to(device) for x in (q, k, v)), Grids(**tables), on_device, operand_scale, score_scale)

    def snap(operand, x):
        own, scale, zero = grids[operand]
        index = sets or [0]
        return centred_codes(x, scale, zero, own, index).double() * scale[index].double().view(-1, 1, 1, 1)

    q, k, v = snap("q", q * operand_scale), snap("k", k * operand_scale), snap("v", v)
    weights = snap("w", (q @ k.transpose(-1, -2) * score_scale).softmax(-1))
    # One code of the softmax output may round the other way in a row where float32 crosses a tie.
    step = grids["w"][1].max() * v.abs().max()
    away = (out.cpu().double() - weights @ v).abs()
    assert away.max() <= 1.01 * step + 1e-5
    flipped = (away > 1e-5).any(-1).double().mean()
    assert flipped <= (0.02 if w_spec.bits <= 8 else 1.0)
    assert (away.mean() / (weights @ v).abs().mean()) < 1e-4
    assert out.shape == (2, heads, queries, values) and out.transpose(1, 2).is_contiguous()
