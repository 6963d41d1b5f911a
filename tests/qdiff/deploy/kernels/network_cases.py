"""Layers, norms and whole networks on kernels, against the integer reference with the same codes."""

from dataclasses import replace

import pytest
import torch

from qdiff.deploy.convert import integer_network
from qdiff.deploy.kernels.convert import to_kernels
from qdiff.deploy.kernels.layers import KernelAttention, KernelLayer, KernelNorm, plain_layer
from qdiff.deploy.layers import IntegerLayer
from qdiff.recipes.recipe import QuantSpec, Recipe, StepGroups
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

STAGES = (WeightRanges(RangeSpec()), ActivationRanges())
W8A8 = Recipe("w8a8", QuantSpec(8, axis="out_channel"), QuantSpec(8), split_shortcuts=True, stages=STAGES)
W4A8 = replace(W8A8, weights=QuantSpec(4, axis="out_channel"), step_groups=StepGroups(3))
LAYER_RECIPES = {
    "w8a8": W8A8,
    "w4a8 groups": W4A8,
    "per channel": replace(W8A8, weights=QuantSpec(4, axis="tensor"), activations=QuantSpec(4, axis="in_channel")),
    "weights only": replace(W8A8, activations=None, stages=STAGES[:1]),
}
LATENT_LAYERS = ("input_blocks.1.0.emb_layers.1", "input_blocks.2.0.op", "input_blocks.3.1.qkv")
PIXEL_LAYERS = ("conv_in", "temb.dense.1", "down.0.downsample.conv", "up.0.block.0.nin_shortcut", "up.1.attn.0.q")


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def count(network, kind):
    return sum(isinstance(m, kind) for m in network.modules())


def inputs_of(network, names, *arguments):
    """What the named layers are called with, and what they return."""
    seen = {}
    for name in names:
        hook = network.get_submodule(name).register_forward_hook
        hook(lambda _, args, out, name=name: seen.__setitem__(name, (args[0], out)))
    network(*arguments)
    return seen


@pytest.mark.parametrize("name, family", [*((name, "pixel") for name in LAYER_RECIPES), ("w8a8", "latent")])
@pytest.mark.cases("w4a8 groups-pixel", "w8a8-latent", "weights only-pixel")
def test_layers_alone(name, family, quantized, quantized_latent, generator, device):
    """Every kind of layer: strided and split, linear, one-dimensional; alone, with an addend, and as a plain layer."""
    recipe = LAYER_RECIPES[name]
    names, network = (PIXEL_LAYERS, quantized(recipe)) if family == "pixel" else (LATENT_LAYERS, None)
    network = quantized_latent(recipe, "plain") if network is None else network
    integer = integer_network(network).to(device)
    t = torch.tensor([950, 50], device=device)
    seen = inputs_of(integer, names, torch.randn(2, 3, 8, 8, generator=generator).to(device), t)
    with integer.step_table.at(t):
        for name, (x, expected) in seen.items():
            layer = KernelLayer(integer.get_submodule(name), torch.float32)
            other = torch.randn(expected.shape, generator=generator).to(device)
            assert relative(layer.forward_plus(x, other), expected + other) < 2e-6, name
            half = KernelLayer(integer.get_submodule(name), torch.float16)
            out = half(x.half())
            assert relative(out, expected) < 0.05 and out.dtype == torch.float16, name
            weight = torch.cat([part.weight() for part in integer.get_submodule(name).parts], 1)
            assert torch.equal(plain_layer(layer).weight, weight)


@pytest.mark.long
def test_a_pixel_network(quantized, adapter, generator, device):
    """In half precision, in a later step group: inputs in any dtype, predictions in theirs; scales stay
    float32, and a chosen layer is a plain one, which leaves its norm float."""
    recipe = replace(W4A8, activations=QuantSpec(8, "signed"), softmax=QuantSpec(16, "unsigned"))
    integer = integer_network(quantized(recipe)).to(device)
    x, t = torch.randn(1, 3, 8, 8, generator=generator).to(device), torch.tensor([450], device=device)
    expected, layers, norms = integer(x, t), count(integer, IntegerLayer), len(adapter.norm_feeds(integer))
    network = to_kernels(integer, adapter, torch.float16, {"mid.attn_1.q": "float", "conv_in": "float"})
    out = network(x.double(), t)
    assert out.dtype == torch.float64 and relative(out, expected) < 0.2  # half precision flips codes
    assert count(network, KernelLayer) == layers - 2 and count(network, KernelNorm) == norms - 1
    assert type(network.conv_in) is torch.nn.Conv2d and network.conv_in.weight.dtype == torch.float16
    assert type(network.mid.attn_1.norm) is torch.nn.GroupNorm
    assert all(m.grid.scale.dtype == torch.float32 for m in network.modules() if isinstance(m, KernelNorm))
    assert all(m.bias is None or m.bias.dtype == torch.float32 for m in network.modules() if isinstance(m, KernelLayer))


@pytest.mark.long
@pytest.mark.parametrize("form, attention", [("transformer", "integer"), ("labels", "float")])
@pytest.mark.cases("transformer-integer")
def test_a_latent_network(quantized_latent, latent_states, latent_adapter, form, attention, device):
    """Transformers; and norms before a resampling or the embedding's scale and shift, which stay float."""
    sizes = {"channel_mult": [1], "attention_resolutions": [1]} if form == "transformer" else {}
    quantized = quantized_latent(W8A8, form, **{"model_channels": 32, "attention_resolutions": [2], **sizes})
    integer, data = integer_network(quantized, attention).to(device), latent_states(form)
    # Of 4 pixels: interpreting takes a time that grows with them.
    arguments = [x[:1].to(device) for x in (data.x[..., :4, :4], data.t, data.context)]
    expected = integer(*arguments)
    network = to_kernels(integer, latent_adapter, torch.float32)
    assert relative(network(*arguments), expected) < 0.05
    assert count(network, KernelNorm) == len(latent_adapter.norm_feeds(network))
    assert count(network, KernelAttention) > 0
