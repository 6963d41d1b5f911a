"""Quantizers put into a whole network: what keeps its name and identity, and what the rules change."""

import pytest
import torch
from torch import nn

from ddim.attention import DotProductAttention
from qdiff.nn.grid import Grid
from qdiff.nn.layers import QuantAttention, act_quantizers, quant_layers
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.recipe import COMPAT, QuantSpec, Recipe, Rule, StepGroups, softmax_spec

W4, A8S = QuantSpec(4, "affine", "out_channel"), QuantSpec(8, "signed")
W4A8 = Recipe("w4a8", W4, A8S, split_shortcuts=True)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_float_parameters_keep_their_names_and_identity(network, adapter):
    former = dict(network.named_parameters())
    inserted = insert_quantizers(network, W4A8, adapter)
    assert inserted is network
    now = dict(network.named_parameters())
    assert all(now[name] is parameter for name, parameter in former.items())
    new = now.keys() - former.keys()
    assert new and all("quantizer" in name for name in new)


def test_every_layer_and_every_attention_product_is_replaced(network, adapter):
    before = [n for n, m in network.named_modules() if type(m) in (nn.Conv1d, nn.Conv2d, nn.Linear)]
    products = [n for n, m in network.named_modules() if isinstance(m, DotProductAttention)]
    insert_quantizers(network, W4A8, adapter)
    assert list(quant_layers(network)) == before
    assert [n for n, m in network.named_modules() if isinstance(m, QuantAttention)] == products != []
    assert not any(type(m) in (nn.Conv2d, nn.Linear, DotProductAttention) for m in network.modules())


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_inserted_modules_take_the_mode_of_what_they_replace(network, adapter, mode):
    insert_quantizers(network.train(mode), W4A8, adapter)
    assert {m.training for m in network.modules()} == {mode}


@pytest.mark.parametrize(
    "recipe", [W4A8, Recipe("w4", W4), Recipe("grouped", W4, A8S, step_groups=StepGroups(3))], ids=lambda r: r.name
)
def test_nothing_is_quantized_until_something_is_set(make_network, adapter, states, timesteps, recipe):
    inserted = insert_quantizers(make_network(64).double(), recipe, adapter, timesteps)
    expected = make_network(64).double()(states.x, states.t)
    assert relative(inserted(states.x, states.t), expected) < 1e-12  # attention sums in another order than torch's own


def test_weights_only_recipes_leave_attention_products_float(network, adapter):
    insert_quantizers(network, Recipe("w4", W4), adapter)
    assert not act_quantizers(network)
    assert any(isinstance(m, DotProductAttention) for m in network.modules())


def test_split_boundaries_are_the_widths_of_the_features_that_the_network_joins(network, adapter, states):
    boundaries, names = {}, {id(m): n for n, m in network.named_modules()}
    for segment in network.chain():
        if segment.name.startswith("up") and "block" in segment.name:
            boundaries[f"{names[id(segment.module)]}.nin_shortcut"] = None
    state = network.start(states.x, states.t)
    for segment in network.chain():
        if (key := f"{segment.name}.nin_shortcut") in boundaries:
            boundaries[key] = state.h.shape[1]
        state = segment(state)
    insert_quantizers(network, W4A8, adapter)
    layers = quant_layers(network)
    assert {n: m.boundary for n, m in layers.items() if m.boundary is not None} == boundaries
    assert len(set(boundaries.values())) > 1
    for name, boundary in boundaries.items():
        layer = layers[name]
        assert [len(layer.weight_quantizers), len(layer.act_quantizers)] == [2, 2]
        assert [part.stop - part.start for part in layer.slices] == [boundary, layer.weight.shape[1] - boundary]


def test_nothing_is_split_unless_the_recipe_asks(network, adapter):
    insert_quantizers(network, Recipe("w4a8", W4, A8S), adapter)
    assert all(m.boundary is None and len(m.act_quantizers) == 1 for m in quant_layers(network).values())


# Rules


def bits_of(network):
    return {
        name: (
            layer.weight_quantizers[0].spec.bits if layer.weight_quantizers else None,
            layer.act_quantizers[0].spec.bits if layer.act_quantizers else None,
        )
        for name, layer in quant_layers(network).items()
    }


def test_rules_change_bits_of_the_layers_they_match_and_later_rules_win(network, adapter):
    rules = (
        Rule("*.conv1", weight_bits=8),
        Rule("conv_*", 8, 8),
        Rule("conv_out", act_bits=0),
        Rule("mid.block_1.conv1", weight_bits=0),
        Rule("temb.*", 0, 0),
        Rule("temb.dense.1", 6, 6),
    )
    insert_quantizers(network, Recipe("mixed", W4, QuantSpec(6), rules=rules), adapter)
    bits = bits_of(network)
    special = {
        "conv_in": (8, 8),
        "conv_out": (8, None),
        "mid.block_1.conv1": (None, 6),
        "temb.dense.0": (None, None),
        "temb.dense.1": (6, 6),
    }
    for name, found in bits.items():
        expected = special.get(name, (8, 6) if name.endswith(".conv1") else (4, 6))
        assert found == expected, name
    kinds = {
        layer.weight_quantizers[0].spec.axis for layer in quant_layers(network).values() if layer.weight_quantizers
    }
    assert kinds == {"out_channel"}  # a rule changes bits, nothing else


def test_an_activation_rule_cannot_quantize_what_the_recipe_leaves_float(network, adapter):
    insert_quantizers(network, Recipe("w4", W4, rules=(Rule("conv_in", act_bits=8),)), adapter)
    assert not act_quantizers(network)


def test_a_rule_that_matches_nothing_is_an_error_naming_some_layers(network, adapter):
    with pytest.raises(ValueError, match="rule 'conv_inn' matches no layer of the network, e.g. temb.dense.0"):
        insert_quantizers(network, Recipe("typo", W4, rules=(Rule("conv_inn", 8),)), adapter)


def test_a_network_with_grouped_convolutions_is_refused(network, adapter):
    network.conv_in = nn.Conv2d(3, 30, 3, padding=1, groups=3)
    with pytest.raises(ValueError, match="no quantized form"):
        insert_quantizers(network, W4A8, adapter)


def test_rules_of_roles_speak_of_the_layers_that_have_them_in_every_family(
    network, adapter, make_latent, latent_adapter
):
    rules = (Rule("role:input", 8, 8), Rule("role:output", 8), Rule("role:time", act_bits=0))
    for float_network, family in ((network, adapter), (make_latent("plain"), latent_adapter)):
        roles = family.roles(float_network)
        insert_quantizers(float_network, Recipe("roles", W4, QuantSpec(6), rules=rules), family)
        for name, found in bits_of(float_network).items():
            expected = (8, 8) if name in roles["input"] else (8, 6) if name in roles["output"] else (4, 6)
            assert found == ((4, None) if name in roles["time"] else expected), name


def test_a_role_without_layers_is_an_error_like_any_rule_that_matches_nothing(network, adapter):
    with pytest.raises(ValueError, match="rule 'role:feed_forward' matches no layer of the network"):
        insert_quantizers(network, Recipe("x", W4, rules=(Rule("role:feed_forward", 8),)), adapter)


def test_layers_with_one_set_have_it_while_others_have_one_per_group(wide_network, adapter, timesteps, states):
    recipe = Recipe("time", W4, A8S, step_groups=StepGroups(size=4), rules=(Rule("role:time", one_set=True),))
    time = adapter.roles(wide_network)["time"]
    insert_quantizers(wide_network, recipe, adapter, timesteps)
    for name, layer in quant_layers(wide_network).items():
        assert {q.scale.shape[0] for q in layer.act_quantizers} == {1 if name in time else 3}, name
        assert {q.steps is wide_network.step_table for q in layer.act_quantizers} == {name not in time}
    for quantizer in act_quantizers(wide_network).values():
        quantizer.set_grid(Grid(torch.tensor(0.05), torch.tensor(0.0), quantizer.spec))
    wide_network.double()  # in float32 a batch of another size sums in another order, and ties round the other way
    mixed = wide_network(states.x, states.t)  # its batch has all groups
    alone = torch.cat([wide_network(x[None], t[None]) for x, t in zip(states.x, states.t, strict=True)])
    assert relative(mixed, alone) < 1e-9


# Softmax outputs


def test_softmax_outputs_have_an_unsigned_grid_with_their_own_bits(network, adapter):
    recipe = Recipe("sm16", W4, A8S, QuantSpec(16, "unsigned"))
    insert_quantizers(network, recipe, adapter)
    products = [m for m in network.modules() if isinstance(m, QuantAttention)]
    assert {(m.act_quantizer_w.spec.bits, m.act_quantizer_w.spec.kind) for m in products} == {(16, "unsigned")}
    assert {m.act_quantizer_q.spec for m in products} == {A8S}
    assert softmax_spec(W4A8) == QuantSpec(8, "unsigned")


@pytest.mark.parametrize("act", [A8S, QuantSpec(8)], ids=lambda s: s.kind)
def test_symmetric_softmax_takes_the_activations_grid_and_keeps_its_bits(act):
    assert "symmetric_softmax" in COMPAT
    recipe = Recipe("b9", W4, act, QuantSpec(6, "unsigned"), compat=("symmetric_softmax",))
    assert softmax_spec(recipe) == QuantSpec(6, act.kind)


def test_operands_of_attention_have_one_scale_where_layers_have_one_per_channel(network, adapter, timesteps):
    recipe = Recipe("a4", W4, QuantSpec(4, axis="in_channel"), step_groups=StepGroups(2))
    insert_quantizers(network, recipe, adapter, timesteps)
    shapes = {n: tuple(q.scale.shape) for n, q in act_quantizers(network).items()}
    assert shapes["conv_in.act_quantizer"] == (2, 3) and shapes["temb.dense.0.act_quantizer"] == (2, 32)
    assert {s for n, s in shapes.items() if ".attention." in n} == {(2,)}


def test_a_network_in_double_precision_stays_so(network, adapter, states):
    insert_quantizers(network.double(), W4A8, adapter)
    floats = {t.dtype for t in network.state_dict().values() if t.is_floating_point()}
    assert floats == {torch.float64}
    assert network(states.x.double(), states.t).dtype == torch.float64
