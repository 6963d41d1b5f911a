"""The fused kernels against the same arithmetic in PyTorch.

Run by nn/test_fused.py, interpreted on the CPU or on a GPU.
"""

import os

import pytest
import torch

from qdiff.nn import fused
from qdiff.nn.functional import soft_round
from qdiff.nn.grid import Grid, _FakeQuantize
from qdiff.recipes.recipe import QuantSpec

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SPECS = [QuantSpec(8, "affine"), QuantSpec(8, "signed"), QuantSpec(4, "unsigned"), QuantSpec(16, "unsigned")]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def leaf(tensor):
    return tensor.to(DEVICE).requires_grad_()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.bits}")
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7, 11), (2, 1024), (1025,)], ids=str)
def test_fake_quantization_and_its_gradients(generator, spec, shape):
    """Values and the gradient of x to the last bit, the scale's to the rounding of a sum; ties and clipped included."""
    scale = leaf(torch.tensor([0.25]))
    zero = torch.tensor([3.0 if spec.kind == "affine" else 0.0], device=DEVICE)
    x = torch.randn(shape, generator=generator) * 2 ** (spec.bits - 2)
    x = leaf(torch.where(torch.rand(shape, generator=generator) < 0.3, (x * 8).round() / 8, x))  # ties of the grid
    weight = torch.randn(shape, generator=generator).to(DEVICE)
    results = []
    for function in (fused.FusedFakeQuantize, _FakeQuantize):
        out = function.apply(x, scale, zero, spec.qmin, spec.qmax)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (x, scale))))
    (out, grad_x, grad_scale), (plain_out, plain_x, plain_scale) = results
    assert torch.equal(out, plain_out) and torch.equal(grad_x, plain_x)
    torch.testing.assert_close(grad_scale, plain_scale, rtol=1e-4, atol=1e-3)


def test_far_values_are_clipped():
    x, scale = leaf(torch.tensor([1e30, -1e30, 3e6, -3e6])), leaf(torch.tensor([1e-3]))
    out = fused.FusedFakeQuantize.apply(x, scale, torch.zeros(1, device=DEVICE), -128, 127)
    assert torch.equal(out.cpu(), torch.tensor([127, -128, 127, -128]) * scale.cpu())
    assert not torch.autograd.grad(out.sum(), x)[0].any()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(9, 4, 3, 3), (5, 300), (3, 2, 1)], ids=str)
def test_soft_rounding_and_its_gradient(generator, bits, shape):
    spec = QuantSpec(bits, "affine", "out_channel")
    rows = (shape[0], *[1] * (len(shape) - 1))
    base = torch.randn(shape, generator=generator).to(DEVICE)
    scale = (torch.rand(rows, generator=generator) * 0.3 + 0.05).to(DEVICE)
    zero = torch.randint(0, spec.qmax, rows, generator=generator).float().to(DEVICE)
    alpha = leaf(torch.randn(shape, generator=generator) * 3)
    weight = torch.randn(shape, generator=generator).to(DEVICE)
    out = fused.FusedSoftRound.apply(base, scale, zero, alpha, spec)
    codes = torch.floor(base / scale) + soft_round(alpha) + zero
    plain = (codes.clamp(spec.qmin, spec.qmax) - zero) * scale
    torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-6)
    found, expected = (torch.autograd.grad((o * weight).sum(), alpha)[0] for o in (out, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_arithmetic_takes_the_kernels_where_they_fit(generator):
    x = leaf(torch.randn(4, 6, generator=generator))
    one, many = leaf(torch.tensor([0.1])), leaf(torch.full((4, 1), 0.1))
    zero = torch.zeros(1, device=DEVICE)

    def kind(tensor, scale):
        return type(Grid(scale, zero, SPECS[1]).snap(tensor).grad_fn).__name__

    assert kind(x, one) == "FusedFakeQuantizeBackward"
    for tensor, scale in ((x, many), (x.T, one), (x.double(), one.double())):
        assert kind(tensor, scale) == "_FakeQuantizeBackward"
