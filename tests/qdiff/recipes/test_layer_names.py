"""Layers by pattern and by role: what matches, and which layers of real networks have which role."""

from pathlib import Path

import pytest
import torch
from torch import nn

import ddim.pretrained
import ldm.pretrained
from qdiff.families import adapter_for
from qdiff.nn.layers import quant_layers
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.layer_names import ROLES, check_pattern, matches, matching
from qdiff.recipes.recipe import QuantSpec, Recipe, Rule
from qdiff.recipes.stages import Finetune

ROOT = Path(__file__).parents[3]
NAMES = ["conv_in", "down.0.conv1", "down.0.temb_proj", "conv_out"]
TOY = {"input": ("conv_in",), "output": ("conv_out",), "time": ("down.0.temb_proj",), "feed_forward": ()}


# Patterns


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("conv_in", ["conv_in"]),
        ("conv_*", ["conv_in", "conv_out"]),
        ("*conv[12]", ["down.0.conv1"]),
        ("CONV_IN", []),
        ("role:time", ["down.0.temb_proj"]),
        ("role:feed_forward", []),
        ("role:attention", []),  # a network without any
        ("input", []),
    ],
)
def test_a_pattern_is_a_name_with_wildcards_or_a_role(pattern, found):
    assert [name for name in NAMES if matches(pattern, name, TOY)] == found


def test_names_that_several_patterns_speak_of_come_once_and_in_their_order():
    assert matching(("role:output", "conv_*", "*"), NAMES, TOY) == NAMES
    assert matching(("role:output", "role:time"), NAMES, TOY) == ["down.0.temb_proj", "conv_out"]
    assert matching((), NAMES, TOY) == []
    assert matching((pattern for pattern in ["conv_*"]), NAMES, TOY) == ["conv_in", "conv_out"]  # read once


@pytest.mark.parametrize(
    "make", [check_pattern, Rule, lambda pattern: Finetune(layers=("conv_in", pattern))], ids=["check", "rule", "stage"]
)
def test_an_unknown_role_is_refused_where_it_is_given(make):
    with pytest.raises(ValueError, match=rf"role: expected one of {', '.join(ROLES)}, found 'inputs'"):
        make("role:inputs")
    for role in ROLES:
        make(f"role:{role}")


# Real networks

BLOCKS = {"configs/cifar10-small.yml": 22, "models/cifar10-ldm/config.yaml": 11, "models/cifar10-sd/config.yaml": 11}
BLOCKS |= {"models/ldm/lsun_beds256/config.yaml": 22, "models/ldm/lsun_churches256/config.yaml": 35}
# By position EDA-DM finds these (methods, E1): LDM-4's last block has no attention behind it.
LAST_BUT_ONE = {
    "configs/cifar10-small.yml": "up.3.upsample.conv",
    "models/cifar10-ldm/config.yaml": "output_blocks.5.1.proj_out",
    "models/cifar10-sd/config.yaml": "output_blocks.5.1.proj_out",
    "models/ldm/lsun_beds256/config.yaml": "output_blocks.11.0.skip_connection",
    "models/ldm/lsun_churches256/config.yaml": "output_blocks.14.1.proj_out",
}


@pytest.fixture(scope="module", params=LAST_BUT_ONE)
def real(request):
    """(configuration, its network without weights, the adapter)."""
    family = "ddim" if request.param.endswith("yml") else "ldm"
    source = {"ddim": ddim.pretrained, "ldm": ldm.pretrained}[family]
    with torch.device("meta"):
        return request.param, source.build_network(source.load_config(ROOT / request.param)), adapter_for(family)


def test_every_role_is_answered_with_layers_of_the_network(real):
    _, network, adapter = real
    modules, roles = dict(network.named_modules()), adapter.roles(network)
    assert roles.keys() == ROLES.keys()
    for role, names in roles.items():
        assert len(set(names)) == len(names), role
        assert all(type(modules[name]) in (nn.Conv2d, nn.Conv1d, nn.Linear) for name in names), role
    assert all(len(roles[role]) == 1 for role in ("input", "output", "first_defined", "before_last_defined"))


def test_the_layers_found_by_position_are_those_that_eda_dm_finds(real):
    config, network, adapter = real
    roles = adapter.roles(network)
    first = "temb.dense.0" if adapter.family == "ddim" else "time_embed.0"
    assert roles["first_defined"] == (first,) and roles["before_last_defined"] == (LAST_BUT_ONE[config],)


def test_input_and_output_have_the_networks_channels(real):
    _, network, adapter = real
    modules, roles = dict(network.named_modules()), adapter.roles(network)
    first, last = modules[roles["input"][0]], modules[roles["output"][0]]
    config = network.config
    assert first.in_channels == config["in_channels"]
    assert last.out_channels == config.get("out_ch", config.get("out_channels"))


def test_each_residual_block_has_one_projection_of_the_time_embedding(real):
    config, network, adapter = real
    modules, time = dict(network.named_modules()), adapter.roles(network)["time"]
    assert len(time) == BLOCKS[config] and all(type(modules[name]) is nn.Linear for name in time)
    assert len({modules[name].in_features for name in time}) == 1  # the width of the embedding


def test_attention_projects_features_and_never_the_prompt(real):
    config, network, adapter = real
    modules, roles = dict(network.named_modules()), adapter.roles(network)
    products, attention = adapter.attention_products(network), roles["attention"]
    assert products and attention
    if adapter.family == "ddim":
        assert len(attention) == 3 * len(products)
        assert all(modules[name].in_channels == modules[name].out_channels for name in attention)
    elif network.config["use_spatial_transformer"]:
        # q, k, v of the first attention of each block, q of the second, which looks at the prompt.
        assert len(attention) == 2 * len(products)
        assert not any(name.endswith(("attn2.to_k", "attn2.to_v")) for name in attention)
        assert len(roles["feed_forward"]) == len(products)
    else:
        assert len(attention) == len(products) and roles["feed_forward"] == ()
        assert all(modules[name].out_channels == 3 * modules[name].in_channels for name in attention)


def test_feed_forward_layers_widen_and_narrow_again(real):
    _, network, adapter = real
    modules, names = dict(network.named_modules()), adapter.roles(network)["feed_forward"]
    for wide, narrow in zip(names[::2], names[1::2], strict=True):
        assert modules[wide].out_features > modules[wide].in_features == modules[narrow].out_features
        assert modules[narrow].out_features < modules[narrow].in_features


def test_quantizers_change_no_role(make_network, adapter, make_latent, latent_adapter):
    networks = [(make_network(32), adapter)]
    networks += [(make_latent(form), latent_adapter) for form in ("plain", "transformer")]
    for network, family in networks:
        before = family.roles(network)
        insert_quantizers(network, Recipe("w4a8", QuantSpec(4), QuantSpec(8), split_shortcuts=True), family)
        assert family.roles(network) == before
        assert {name for names in before.values() for name in names} <= quant_layers(network).keys()
