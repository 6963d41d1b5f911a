from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddim.pretrained import build_network, load_config
from ldm.pretrained import build_network as build_latent
from ldm.pretrained import load_config as load_latent
from qdiff.deploy.convert import integer_network
from qdiff.evaluation.cost import Product, cost_of, counted_bits, float_bytes, stored_bytes
from qdiff.families import adapter_for
from qdiff.methods import MethodOptions, make_recipe
from qdiff.nn.layers import QuantAttention
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.recipe import Rule

ROOT = Path(__file__).parents[3]


def test_a_file_takes_its_length(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1234))
    assert stored_bytes(path) == stored_bytes(str(path)) == 1234


def test_a_folder_takes_its_files(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "recipe.yaml").write_bytes(bytes(30))
    assert stored_bytes(tmp_path) == 1030


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        stored_bytes(tmp_path / "absent.pth")


def test_a_float_network_takes_four_bytes_a_parameter():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert float_bytes(network) == 4 * (8 * 3 * 9 + 8 + 8 + 8)
    assert float_bytes(network.half()) == 4 * (8 * 3 * 9 + 8 + 8 + 8)


def test_a_shared_parameter_counts_once():
    first, second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    second.weight = first.weight
    assert float_bytes(nn.Sequential(first, second)) == 4 * 25


@pytest.fixture(scope="module")
def published():
    """The cost of the published CIFAR-10 model."""
    with torch.device("meta"):
        network = build_network(load_config(ROOT / "configs" / "cifar10.yml"))
    return cost_of(network, adapter_for("ddim"), (3, 32, 32))


# Bit operations of Q-Diffusion's CIFAR-10 table, in units of 1e9.
@pytest.mark.parametrize(
    ("bits", "gbops"), [((32, 32), 6597), ((8, 32), 2294), ((4, 32), 1147), ((8, 8), 798), ((4, 8), 399)]
)
def test_the_published_totals_of_cifar10(published, bits, gbops):
    assert published.uniform_bops(*bits) / 1e9 == pytest.approx(gbops, rel=0.003)  # promised: 1 %


def test_the_published_size_of_cifar10(published):
    assert published.parameters == 35_746_307
    assert published.macs * 2 / 1e9 == pytest.approx(12.47, rel=0.003)
    assert published.parameter_bytes / 1e6 == pytest.approx(143.2, rel=0.003)


LATENT = {  # folder: (conditioning, TBops at 32/32 where published, MB where published)
    "models/ldm/lsun_beds256/config.yaml": ((), 107.17, 1096.2),
    "models/ldm/lsun_churches256/config.yaml": ((), 22.17, None),
}


@pytest.mark.parametrize("path", LATENT)
def test_the_published_totals_of_latent_models(path):
    context, tbops, megabytes = LATENT[path]
    config = load_latent(ROOT / path)
    with torch.device("meta"):
        network = build_latent(config)
    size = config.model.params.image_size
    cost = cost_of(network, adapter_for("ldm"), (network.in_channels, size, size), context)
    assert cost.bops == cost.uniform_bops(32, 32)
    assert cost.bops / 1e12 == pytest.approx(tbops, rel=0.003)
    if megabytes is not None:
        assert cost.parameter_bytes / 1e6 == pytest.approx(megabytes, rel=1e-3)


def test_multiply_accumulates_are_those_that_torch_counts(network, make_latent, adapter, latent_adapter):
    """By its plain attention: of the fused one it counts what the CPU's kernel makes of the shapes, or nothing."""
    latent = make_latent("transformer")
    cases = [
        (network, adapter, (3, 8, 8), ()),
        (latent, latent_adapter, (3, 8, 8), (5, 24)),
        (make_latent("labels"), latent_adapter, (3, 8, 8), ()),
    ]
    for model, of, shape, context in cases:
        extra = {} if not context else {"context": torch.zeros(1, *context)}
        if getattr(model, "label_emb", None) is not None:
            extra = {"y": torch.zeros(1, dtype=torch.long)}
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(torch.zeros(1, *shape), torch.zeros(1), **extra)
        cost = cost_of(model, of, shape, context)
        assert 2 * cost.macs == counter.get_total_flops()
        assert cost.parameters == sum(p.numel() for p in model.parameters())
        assert cost.parameter_bytes == float_bytes(model)


@pytest.fixture
def recipe():
    """W4A8 with 16-bit softmax outputs, one layer of 8 bits with float inputs, one that stays float."""
    made = make_recipe("nearest", MethodOptions(4, 8, True, 16, True))
    rules = Rule("conv_in", weight_bits=8, act_bits=0), Rule("conv_out", weight_bits=0, act_bits=0)
    return replace(made, rules=(*made.rules, *rules))


def test_each_layer_counts_with_its_own_bits(network, adapter, recipe):
    float_cost = cost_of(network, adapter, (3, 8, 8))
    cost = cost_of(insert_quantizers(network, recipe, adapter), adapter, (3, 8, 8))
    assert [p.macs for p in cost.products] == [p.macs for p in float_cost.products]
    bits = {product.name: product.bits for product in cost.products}
    assert bits.pop("conv_in") == (8, 32) and bits.pop("conv_out") == (32, 32)
    of_attention = {name: bits.pop(name) for name in list(bits) if ".attention." in name}
    assert set(bits.values()) == {(4, 8)}
    assert all(found == ((8, 8) if name.endswith("q·k") else (16, 8)) for name, found in of_attention.items())
    assert len(of_attention) == 2 * sum(isinstance(m, QuantAttention) for m in network.modules())
    of_layers = sum(2 * p.macs * 32 for p in cost.products if p.bits == (4, 8))
    rest = {"conv_in": 8 * 23, "conv_out": 23 * 23, "q·k": 8 * 8, "softmax·v": 16 * 8}
    of_rest = sum(2 * p.macs * rest[p.name.split(".")[-1]] for p in cost.products if p.bits != (4, 8))
    assert cost.bops == of_layers + of_rest
    halved = sum(p.weights for p in cost.products if p.bits[0] == 4)
    eighths = sum(p.weights for p in cost.products if p.bits[0] == 8)
    assert float_cost.parameter_bytes - cost.parameter_bytes == halved * 28 // 8 + eighths * 24 // 8


def test_an_integer_network_costs_what_it_stands_for(quantized, adapter, recipe):
    simulated = quantized(recipe)
    assert cost_of(integer_network(simulated), adapter, (3, 8, 8)) == cost_of(simulated, adapter, (3, 8, 8))


def test_a_product():
    assert counted_bits(32) == 23 and counted_bits(8) == 8
    assert Product("x", "conv", 10, 9, 1, (4, 8)).bops == 640
    assert Product("x", "conv", 10, 9, 1, (4, 8)).parameter_bytes == 5 + 4
