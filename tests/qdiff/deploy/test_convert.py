"""Whole networks in integers: the same model, from a network in memory or from a file, without float weights."""

from dataclasses import replace

import pytest
import torch

from qdiff.checkpoints.native import load_checkpoint, save_checkpoint
from qdiff.deploy.convert import integer_network, is_integer, load_integer, quantizes_activations
from qdiff.deploy.layers import IntegerAttention, IntegerLayer
from qdiff.nn.layers import QuantAttention, QuantLayer, act_quantizers, quant_layers, to_double
from qdiff.recipes.recipe import QuantSpec, Recipe, Rule, StepGroups
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

STAGES = (WeightRanges(RangeSpec()), ActivationRanges())
W8A8 = Recipe("w8a8", QuantSpec(8, axis="out_channel"), QuantSpec(8), split_shortcuts=True, stages=STAGES)
RECIPES = {
    "w8a8": W8A8,
    "w4a8 signed": replace(W8A8, weights=QuantSpec(4, axis="out_channel"), activations=QuantSpec(8, "signed")),
    "groups": replace(W8A8, step_groups=StepGroups(3)),
    "16-bit softmax": replace(W8A8, softmax=QuantSpec(16, "unsigned")),
    "per channel": replace(W8A8, activations=QuantSpec(4, axis="in_channel")),
    "weights only": replace(W8A8, activations=None, stages=STAGES[:1]),
    "one set": replace(W8A8, step_groups=StepGroups(3), rules=(Rule("role:time", one_set=True),)),
}
ONE_LEVEL = {"ch_mult": [1], "attn_resolutions": [8]}
LATENT_RECIPES = {name: RECIPES[name] for name in ("w8a8", "groups", "16-bit softmax")}


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture
def batch(generator):
    """A batch with timesteps of several groups."""
    return torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([950, 450, 50, 449])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_same_model_in_integers(recipe, quantized, batch):
    network = quantized(recipe, 64, **ONE_LEVEL)
    integer = integer_network(network)
    assert is_integer(integer) and not is_integer(network)
    assert to_double(network)(batch[0].double(), batch[1]).isfinite().all()
    expected = network(batch[0].double(), batch[1])
    assert relative(integer.double()(batch[0].double(), batch[1]), expected) < 1e-11


@pytest.mark.parametrize("form", ["plain", "transformer", "labels"])
@pytest.mark.parametrize("recipe", LATENT_RECIPES.values(), ids=LATENT_RECIPES)
@pytest.mark.cases("w8a8-labels", "groups-transformer", "16-bit softmax-transformer", "w8a8-plain")
def test_the_same_latent_model_in_integers(recipe, form, quantized_latent, latent_states, latent_adapter):
    network, data = quantized_latent(recipe, form), latent_states(form)
    x, conditioning = data.x[:4].double(), latent_adapter.conditioning(network, None)
    if data.context is not None:
        context = data.context[:4]
        context = context.double() if context.is_floating_point() else context
        conditioning = latent_adapter.conditioning(network, context)
    integer = integer_network(network).double()
    expected = to_double(network)(x, data.t[:4], **conditioning)
    assert relative(integer(x, data.t[:4], **conditioning), expected) < 1e-11


def test_every_layer_given_the_simulations_own_input(quantized, batch):
    """In float32, where whole networks differ by the codes that rounding flips."""
    network = quantized(W8A8, 64, **ONE_LEVEL)
    integer, seen = integer_network(network), {}
    for name, layer in quant_layers(network).items():
        layer.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, (args[0], out)))
    network(*batch)
    layers = {name: m for name, m in integer.named_modules() if isinstance(m, IntegerLayer)}
    assert layers.keys() == seen.keys()
    for name, (x, out) in seen.items():
        assert relative(layers[name](x), out) < 1e-5, name


def test_the_distance_to_float64_is_that_of_the_float32_simulation(quantized, generator):
    """Both are far only where the last digit of a float32 tips a code, which other sums do in other samples: hence
    many samples, and their median, which no single one decides."""
    network = quantized(W8A8, 64, **ONE_LEVEL)
    x, t = torch.randn(32, 3, 8, 8, generator=generator), torch.arange(32) * 31
    integer, simulated = integer_network(network)(x, t), network(x, t)
    exact = to_double(network)(x.double(), t)

    def distance(found):
        return ((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).median().item()

    assert distance(integer) <= 2 * distance(simulated) + 1e-6


def tensors_of(network):
    return [*network.parameters(), *network.buffers()]


def test_a_network_in_integers_holds_no_float_weights(quantized):
    network = quantized(replace(W8A8, weights=QuantSpec(4, axis="out_channel")), 64, **ONE_LEVEL)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    integer = integer_network(network)
    weights = sum(layer.weight.numel() for layer in quant_layers(network).values())
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(integer))
    assert weights / 2 < held < weights  # half a byte a weight, and norms, biases and scales
    assert not any(isinstance(m, QuantLayer | QuantAttention) for m in integer.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert next(integer.parameters()).dtype == torch.float32


def test_from_a_file_as_from_memory(quantized, adapter, timesteps, batch, tmp_path):
    for recipe in RECIPES.values():
        network, path = quantized(recipe, 64, **ONE_LEVEL), tmp_path / "network.safetensors"
        save_checkpoint(path, network, adapter, recipe, timesteps, {"seed": 3})
        found = load_integer(path)
        assert torch.equal(found.network(*batch), integer_network(network)(*batch))
        assert (found.recipe, found.provenance["seed"]) == (recipe, 3)
        assert torch.equal(load_checkpoint(path).network(*batch), network(*batch))
        assert not any(tensor.is_meta for tensor in tensors_of(found.network))


def test_activations_may_be_left_float(quantized, adapter, timesteps, batch, tmp_path):
    network, path = quantized(W8A8, 64, **ONE_LEVEL), tmp_path / "network.safetensors"
    save_checkpoint(path, network, adapter, W8A8, timesteps, {})
    found = load_integer(path, activations=False).network
    assert quantizes_activations(network) and not quantizes_activations(found)
    for quantizer in act_quantizers(network).values():
        quantizer.enabled = False
    assert relative(found(*batch), network(*batch)) < 1e-5


def test_the_file_records_the_policy_of_attention(quantized, adapter, timesteps, tmp_path):
    network, path = quantized(W8A8, 64, **ONE_LEVEL), tmp_path / "network.safetensors"

    def policies(**options):
        found = load_integer(path, **options).network
        return {m.policy for m in found.modules() if isinstance(m, IntegerAttention)}

    save_checkpoint(path, network, adapter, W8A8, timesteps, {})
    assert policies() == {"integer"} and policies(attention="float") == {"float"}
    save_checkpoint(path, network, adapter, W8A8, timesteps, {"attention": "float"})
    assert policies() == {"float"} and policies(attention="integer") == {"integer"}


def test_a_network_without_codes_is_refused(make_network, adapter):
    from qdiff.nn.surgery import insert_quantizers

    network = insert_quantizers(make_network(32), W8A8, adapter)
    with pytest.raises(ValueError, match="its weight has no codes yet; calibrate the network first"):
        integer_network(network)
