"""Portable graphs that TensorRT takes, by its documentation: it needs a GPU even to read one, so nothing runs here."""

import json
from dataclasses import replace

import pytest

from qdiff.deploy.convert import integer_network
from qdiff.deploy.onnx.export import make_model, unfit_for_tensorrt
from qdiff.recipes.recipe import QuantSpec, Recipe
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

# What networks like ours may need of the operators that TensorRT 10.15's ONNX parser lists, up to opset 24.
SUPPORTED = """
    Add AveragePool Clip Concat Conv Cos DequantizeLinear Div Erf Gather Gelu Gemm Identity InstanceNormalization
    LayerNormalization MatMul Max Min Mul Pad Pow QuantizeLinear ReduceMean Reshape Resize Sigmoid Sin Slice Softmax
    Split Sqrt Sub Tanh Transpose
"""
SYMMETRIC = Recipe(
    *("symmetric", QuantSpec(8, "signed", "out_channel"), QuantSpec(8, "signed")),
    stages=(WeightRanges(RangeSpec()), ActivationRanges()),
)


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("plain", "labels")]


@pytest.fixture(params=["pixel", "transformer", *LONG])
def graph(request, quantized, adapter, quantized_latent, latent_adapter, latent_states):
    """(recipe, policy of attention) -> the portable graph of a network of that form"""

    def make(recipe, attention):
        if request.param == "pixel":
            return make_model(integer_network(quantized(recipe, 64), attention), adapter, (3, 8, 8), None, "portable")
        context = latent_states(request.param).context
        sizes = None if context is None else tuple(context.shape[1:])
        network = integer_network(quantized_latent(recipe, request.param), attention)
        return make_model(network, latent_adapter, (3, 8, 8), sizes, "portable")

    return make


def test_symmetric_grids_and_float_softmax_outputs_fit(graph):
    for recipe in (SYMMETRIC, replace(SYMMETRIC, weights=QuantSpec(4, axis="out_channel"))):
        model = graph(recipe, "float")
        unfit, count = unfit_for_tensorrt(model)
        assert unfit == 0 and count > 20
        assert {node.op_type for node in model.graph.node} <= set(SUPPORTED.split())
        assert all(entry.domain == "" and entry.version <= 24 for entry in model.opset_import)
        assert json.loads(model.metadata_props[0].value)["dialect"] == "portable"


def test_what_does_not_fit_is_counted(graph):
    model = graph(SYMMETRIC, "integer")
    softmax = sum(node.op_type == "Softmax" for node in model.graph.node)
    assert softmax and unfit_for_tensorrt(model)[0] == softmax  # unsigned codes
    affine = graph(replace(SYMMETRIC, activations=QuantSpec(8)), "float")
    activations = sum(node.op_type == "QuantizeLinear" for node in affine.graph.node)
    assert unfit_for_tensorrt(affine)[0] == activations
    weights = graph(replace(SYMMETRIC, weights=QuantSpec(8, axis="out_channel")), "float")
    assert 0 < unfit_for_tensorrt(weights)[0] <= unfit_for_tensorrt(weights)[1] - activations


def test_a_zero_point_does_not_fit_in_signed_codes_either(graph):
    model = graph(SYMMETRIC, "float")
    name = next(node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear")
    (zero,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    readers = sum(node.op_type == "QuantizeLinear" and node.input[2] == name for node in model.graph.node)
    zero.raw_data = b"\x01"
    assert unfit_for_tensorrt(model)[0] == readers
