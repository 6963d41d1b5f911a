"""What the latent adapter says of a network, against hand-made lists and against what the network itself does."""

import pytest
import torch
from torch import nn

from ddim.attention import DotProductAttention
from qdiff.calibration.hooks import recording_calls
from qdiff.nn.layers import QUANT_LAYERS, quant_layers
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.recipe import QuantSpec, Recipe

FORMS = ["plain", "transformer", "deep", "labels"]
CHAINS = {
    "plain": [
        "time_embed.0", "time_embed.2",
        "input_blocks.0.0", "input_blocks.1.0", "input_blocks.2.0", "input_blocks.3.0", "input_blocks.3.1",
        "middle_block.0", "middle_block.1", "middle_block.2",
        "output_blocks.0.0", "output_blocks.0.1", "output_blocks.1.0", "output_blocks.1.1", "output_blocks.1.2",
        "output_blocks.2.0", "output_blocks.3.0", "out.2",
    ],
    "transformer": [
        "time_embed.0", "time_embed.2",
        "input_blocks.0.0", "input_blocks.1.0", "input_blocks.2.0", "input_blocks.3.0",
        "input_blocks.3.1.proj_in", "input_blocks.3.1.transformer_blocks.0", "input_blocks.3.1.proj_out",
        "middle_block.0", "middle_block.1.proj_in", "middle_block.1.transformer_blocks.0", "middle_block.1.proj_out",
        "middle_block.2",
        "output_blocks.0.0",
        "output_blocks.0.1.proj_in", "output_blocks.0.1.transformer_blocks.0", "output_blocks.0.1.proj_out",
        "output_blocks.1.0",
        "output_blocks.1.1.proj_in", "output_blocks.1.1.transformer_blocks.0", "output_blocks.1.1.proj_out",
        "output_blocks.1.2", "output_blocks.2.0", "output_blocks.3.0", "out.2",
    ],
}  # fmt: skip
BOUNDARIES = {  # widths 64, 64: every skip joins 64 channels of features
    "plain": {f"output_blocks.{i}.0.skip_connection": 64 for i in range(4)},
    # Widths 64, 128, 64: features enter block 0 and 1 with 64, block 2 with 64, 3 and 4 with 128, 5 with 64 channels.
    "deep": dict(zip((f"output_blocks.{i}.0.skip_connection" for i in range(6)), (64, 64, 64, 128, 128, 64),
                     strict=True)),
}  # fmt: skip


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def run(network, adapter, data):
    with torch.no_grad():
        return network(data.x, data.t, **adapter.conditioning(network, data.context))


def test_segment_by_segment_is_the_forward(make_latent, latent_adapter, latent_states, form):
    """In float64; and the output depends on the timestep and on the conditioning."""
    network, data = make_latent(form).double(), latent_states(form)
    expected = run(network, latent_adapter, data)
    state = latent_adapter.start(network, data.x, data.t, data.context)
    with torch.no_grad():
        for segment in latent_adapter.chain(network):
            state = segment.write(state, segment.module(*segment.read(state)))
    assert torch.equal(state.h, expected) and expected.dtype == torch.float64
    assert state.skips == () and state.entry is None
    other = latent_states(form).t.flip(0)
    with torch.no_grad():
        moved = network(data.x, other, **latent_adapter.conditioning(network, data.context))
    assert (moved - expected).norm() / expected.norm() > 0.01
    if data.context is not None:  # the two halves differ in their conditioning alone
        assert (expected[:10] - expected[10:]).norm() / expected.norm() > 0.01


def test_names_are_those_of_the_modules_and_the_order_is_that_of_execution(
    make_latent, latent_adapter, latent_states, form
):
    network = make_latent(form)
    chain = latent_adapter.chain(network)
    assert all(network.get_submodule(segment.name) is segment.module for segment in chain)
    names = {segment.module: segment.name for segment in chain}
    with recording_calls(names) as called:
        run(network, latent_adapter, latent_states(form))
    assert [names[module] for module in called] == [segment.name for segment in chain]
    assert form not in CHAINS or [segment.name for segment in chain] == CHAINS[form]


def test_every_layer_belongs_to_exactly_one_segment(make_latent, latent_adapter, form):
    """So that nothing is left out of a calibration that goes unit by unit."""
    network = make_latent(form)
    layers = [m for m in network.modules() if type(m) in QUANT_LAYERS]
    held = [m for segment in latent_adapter.chain(network) for m in segment.module.modules() if type(m) in QUANT_LAYERS]
    assert len(held) == len(set(held)) == len(layers) > 20 and set(held) == set(layers)


def test_boundaries_are_the_features_widths(make_latent, latent_adapter, latent_states, form):
    """Measured: what goes into the joining block, less the skip's channels, which are those of the way down."""
    network = make_latent(form)
    found = latent_adapter.split_boundaries(network)
    assert form not in BOUNDARIES or found == BOUNDARIES[form]
    data = latent_states(form)
    state, measured = latent_adapter.start(network, data.x, data.t, data.context), {}
    with torch.no_grad():
        for segment in latent_adapter.chain(network):
            after = segment(state)
            if len(after.skips) < len(state.skips):
                measured[f"{segment.name}.skip_connection"] = state.h.shape[1]
                joined = network.get_submodule(f"{segment.name}.skip_connection").weight.shape[1]
                assert joined == state.h.shape[1] + state.skips[-1].shape[1]
            state = after
    assert found == measured


def test_split_shortcuts_are_cut_there(make_latent, latent_adapter):
    recipe = Recipe("split", QuantSpec(4, axis="out_channel"), QuantSpec(8), split_shortcuts=True)
    layers = quant_layers(insert_quantizers(make_latent("deep"), recipe, latent_adapter))
    assert {name: layer.boundary for name, layer in layers.items() if layer.boundary} == BOUNDARIES["deep"]


def test_attention_products(make_latent, latent_adapter):
    def names(form):
        products = latent_adapter.attention_products(make_latent(form))
        assert all(isinstance(product, DotProductAttention) for product in products.values())
        return list(products)

    where = ("input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1")
    assert sorted(names("plain")) == sorted(f"{name}.attention" for name in where)
    blocks = [f"{name}.transformer_blocks.0.{attn}" for name in where for attn in ("attn1", "attn2")]
    assert sorted(names("transformer")) == sorted(f"{name}.attention" for name in blocks)
    assert sum(".attn" in name for name in names("deep")) == 2 * 3 * 4  # two products, depth 3, at four places


@pytest.mark.parametrize(
    ("form", "name"),
    [("plain", "middle_block.1"), ("transformer", "middle_block.1.proj_in"), ("deep", "middle_block.1.proj_in")],
)
def test_the_middle_attention_sees_the_deepest_map(make_latent, latent_adapter, latent_states, form, name):
    network, data = make_latent(form), latent_states(form)
    assert latent_adapter.middle_attention(network) == name
    state, sizes = latent_adapter.start(network, data.x, data.t, data.context), {}
    with torch.no_grad():
        for segment in latent_adapter.chain(network):
            sizes[segment.name] = state.h.shape
            state = segment(state)
    smallest = min(size[-1] for size in sizes.values() if len(size) == 4)
    assert sizes[name][2:] == (smallest, smallest) and sizes[name] == sizes["middle_block.2"]


def test_time_layers_see_the_time_embedding_alone(make_latent, latent_adapter, latent_states, form):
    network, data = make_latent(form), latent_states(form)
    found = latent_adapter.roles(network)["time"]
    linear = [name for name, m in network.named_modules() if isinstance(m, nn.Linear) and "emb_layers" in name]
    assert list(found) == linear and "input_blocks.1.0.emb_layers.1" in found
    inputs = {}
    for name in found:
        network.get_submodule(name).register_forward_pre_hook(lambda _, a, name=name: inputs.update({name: a[0]}))
    run(network, latent_adapter, data)
    first = inputs[found[0]]
    assert first.shape == (len(data), 256) and all(torch.equal(first, x) for x in inputs.values())


def test_a_configuration_makes_the_same_network_again(make_latent, latent_adapter, latent_states, form):
    network = make_latent(form)
    again = latent_adapter.build(latent_adapter.config_of(network))
    again.load_state_dict(network.state_dict())
    data = latent_states(form)
    assert not again.training and latent_adapter.num_timesteps(again) == 1000
    assert torch.equal(run(again, latent_adapter, data), run(network, latent_adapter, data))
    assert latent_adapter.config_of(again) == latent_adapter.config_of(network)


def test_what_does_not_change_the_outputs_is_not_part_of_a_configuration(make_latent, latent_adapter):
    """So that a checkpoint is not refused for it."""
    other = {"dropout": 0.3, "image_size": 32, "use_checkpoint": True, "legacy": False, "use_fp16": True}
    plain, changed = (make_latent("transformer", **changes) for changes in ({}, other))
    assert latent_adapter.config_of(plain) == latent_adapter.config_of(changed)
    assert latent_adapter.config_of(plain) != latent_adapter.config_of(make_latent("transformer", num_heads=2))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("input_blocks.3.1.attention.act_quantizer_q", "input_blocks.3.1.attention.qkv_matmul.act_quantizer_q"),
        ("input_blocks.3.1.attention.act_quantizer_k", "input_blocks.3.1.attention.qkv_matmul.act_quantizer_k"),
        ("middle_block.1.attention.act_quantizer_v", "middle_block.1.attention.smv_matmul.act_quantizer_v"),
        ("middle_block.1.attention.act_quantizer_w", "middle_block.1.attention.smv_matmul.act_quantizer_w"),
        (
            "middle_block.1.transformer_blocks.0.attn1.attention.act_quantizer_q",
            "middle_block.1.transformer_blocks.0.attn1.act_quantizer_q",
        ),
        (
            "middle_block.1.transformer_blocks.1.attn2.attention.act_quantizer_w",
            "middle_block.1.transformer_blocks.1.attn2.act_quantizer_w",
        ),
        ("output_blocks.0.0.skip_connection.act_quantizer_0", "output_blocks.0.0.skip_connection.act_quantizer_0"),
        ("input_blocks.3.1.qkv.act_quantizer", "input_blocks.3.1.qkv.act_quantizer"),
        ("time_embed.0.act_quantizer", "time_embed.0.act_quantizer"),
    ],
)
def test_published_names(latent_adapter, ours, theirs):
    assert latent_adapter.published_name(ours) == theirs


@pytest.mark.parametrize(
    ("form", "act_kind", "expected"),
    [
        ("plain", "affine", "unsigned"),
        ("plain", "signed", "unsigned"),
        ("transformer", "affine", "unsigned"),
        ("transformer", "signed", "signed"),
    ],
)
def test_published_softmax_grids(make_latent, latent_adapter, form, act_kind, expected):
    assert latent_adapter.published_softmax_kind(make_latent(form), act_kind) == expected


def test_conditioning_of_another_shape_is_refused(make_latent, latent_adapter, latent_states):
    data = latent_states("transformer")
    network = make_latent("transformer")
    for context, found in ((None, "none"), (torch.zeros(20, 5, 23), "20, 5, 23"), (torch.zeros(19, 5, 24), "19, 5")):
        with pytest.raises(ValueError, match=rf"context of shape \[20, L, 24\], found .*{found}"):
            latent_adapter.start(network, data.x, data.t, context)
    with pytest.raises(ValueError, match="labels are needed"):
        latent_adapter.start(make_latent("labels"), data.x, data.t)
