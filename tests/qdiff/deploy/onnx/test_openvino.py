"""Portable graphs in another engine: OpenVINO, where it is installed."""

from dataclasses import replace

import pytest
import torch

from qdiff.deploy.onnx.export import make_model
from qdiff.recipes.recipe import QuantSpec, Recipe
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

openvino = pytest.importorskip("openvino")
W8A8 = Recipe(
    *("w8a8", QuantSpec(8, axis="out_channel"), QuantSpec(8)), stages=(WeightRanges(RangeSpec()), ActivationRanges())
)
COUNT = 8


def compiled(network, adapter, x, context, dialect):
    """(the network in OpenVINO, types its convolutions and linear layers run in)"""
    sizes = None if context is None else tuple(context.shape[1:])
    model = make_model(network, adapter, tuple(x.shape[1:]), sizes, dialect).SerializeToString()
    core = openvino.Core()
    engine = core.compile_model(core.read_model(model), "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
    told = [node.get_rt_info() for node in engine.get_runtime_model().get_ordered_ops()]
    kinds = [(info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in told]
    return engine, {kind: {t for k, t in kinds if k == kind} for kind in ("Convolution", "FullyConnected")}


@pytest.fixture
def pixel_or_latent(request, quantized, adapter, quantized_latent, latent_adapter, latent_states):
    """recipe -> a quantized network of that form, its adapter, and a context for it"""

    def make(recipe):
        if request.param == "pixel":
            return quantized(recipe, 64), adapter, None
        known = latent_states(request.param).context
        return quantized_latent(recipe, request.param), latent_adapter, known[torch.arange(COUNT) % len(known)]

    return make


@pytest.mark.parametrize(
    ("weights", "dialect", "types"),
    [
        (QuantSpec(4, axis="out_channel"), "portable", {"u8"}),
        (QuantSpec(8, "signed", "out_channel"), "portable", {"u8"}),
        (QuantSpec(8, axis="out_channel"), "portable", {"f32"}),
        (QuantSpec(4, axis="out_channel"), "portable-4bit", {"f32"}),
    ],
    ids=["4", "8 signed", "8 affine", "4 in 4"],
)
@pytest.mark.parametrize("pixel_or_latent", ["pixel", "transformer"], indirect=True)
def test_whole_networks(pixel_or_latent, weights, dialect, types, in_double, generator):
    """The float64 simulation, but for samples in which codes take a neighbour's place (up to a few percent); and
    convolutions in integers where weights have no zero points."""
    network, adapter, context = pixel_or_latent(replace(W8A8, weights=weights))
    x, t = torch.randn(COUNT, 3, 8, 8, generator=generator), torch.randint(1000, (COUNT,), generator=generator)
    given = (x, t) if context is None else (x, t, context)
    engine, found_types = compiled(network, adapter, x, context, dialect)
    names = ("x", "t", "context")
    feed = {name: value.float().numpy() for name, value in zip(names, given, strict=False)}
    found, expected = torch.from_numpy(engine(feed)[0]), in_double(network, *given)
    wrong = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert wrong.min() < 2e-3 and wrong.mean() < 0.04
    assert found_types["Convolution"] == types
