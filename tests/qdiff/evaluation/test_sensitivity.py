"""What one unit's quantization costs, and bits under a budget."""

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.rollout import Rollouts
from qdiff.calibration.selectors import CalibrationSet
from qdiff.calibration.trajectories import Trajectories
from qdiff.checkpoints.native import packed_state
from qdiff.evaluation.allocation import allocate, bit_operations, mixed_recipe
from qdiff.evaluation.heatmap import Panel, heat_map
from qdiff.evaluation.sensitivity import _stored_bytes, measure, unit_costs
from qdiff.families import adapter_for
from qdiff.methods import MethodOptions, make_recipe
from qdiff.nn.layers import quant_layers

ADAPTER = adapter_for("ddim")
T = torch.tensor([900.0, 600.0, 100.0])


class Path:
    """A sampler of three calls, one a step, with known coefficients."""

    step, t, scale, calls = (0, 1, 2), T.double(), 1.0, 3
    coefficients = torch.tensor([[0, 0, 0], [-1, 0, 0], [-2, 3, 0], [0.5, -4, 2]], dtype=torch.float64)
    start = torch.ones(4, dtype=torch.float64)

    def first_call(self, step):
        return step

    def next_state(self, call):
        return call + 1


@pytest.fixture(scope="module")
def measured(make_network):
    """(float network, recipes, Sensitivity, rollouts, calibration states)"""
    network, generator = make_network(32).double(), torch.Generator().manual_seed(3)  # in float32 codes at ties flip
    xs = tuple(torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in T)
    rollouts = Rollouts(Trajectories(xs, tuple(t.expand(3) for t in T), {}), Path())
    data = CalibrationSet(torch.cat(xs), T.repeat_interleave(3), torch.arange(3).repeat_interleave(3))
    recipes = {bits: make_recipe("nearest", MethodOptions(bits, 8, split=True)) for bits in (3, 8)}
    return network, recipes, measure(network, ADAPTER, recipes, data, rollouts, 2, 0), rollouts, data


def test_errors_are_those_of_a_network_with_one_unit_replaced(measured):
    """By the definition: sample after sample, the whole network with that unit in place of the float one."""
    network, recipes, found, rollouts, data = measured
    quantized = calibrate(network, ADAPTER, recipes[3], data, 0, T).network
    for name in ("conv_in", "mid.attn_1", "up.0.block.0"):
        float_unit = network.get_submodule(name)
        network.set_submodule(name, quantized.get_submodule(name))
        calls = [(x[:2], t[:2]) for x, t in zip(rollouts.trajectories.xs, rollouts.trajectories.ts, strict=True)]
        changed = torch.stack([network(*call) for call in calls])
        network.set_submodule(name, float_unit)
        differences = changed - torch.stack([network(*call) for call in calls])
        u = found.units.index(name)
        assert torch.allclose(found.single[u, 0], differences.square().mean((1, 2, 3, 4)), rtol=1e-9)
        end = torch.einsum("s,s...->...", Path.coefficients[-1], differences)
        assert torch.allclose(found.end[u, 0], end.square().mean(), rtol=1e-9)
    assert torch.equal(found.carried, Path.coefficients[-1])


def test_errors_of_a_guided_prediction(make_latent, latent_adapter):
    """The unconditional prediction's error, and `scale` times how much more the conditional one errs."""
    generator, network = torch.Generator().manual_seed(4), make_latent("transformer").double()

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    xs, (cs, ucs) = tuple(drawn(2, 3, 8, 8) for _ in T), (drawn(2, 5, 24), drawn(2, 5, 24))
    extra = {"cs": (cs,) * 3, "ucs": (ucs,) * 3}
    path = type("Guided", (Path,), {"scale": 3.0})()
    rollouts = Rollouts(Trajectories(xs, tuple(t.expand(2) for t in T), extra), path)
    data = CalibrationSet(
        torch.cat(xs), T.repeat_interleave(2), torch.arange(3).repeat_interleave(2), cs.repeat(3, 1, 1)
    )
    recipe = make_recipe("nearest", MethodOptions(3, 8, family="text"))
    found = measure(network, latent_adapter, {3: recipe}, data, rollouts, 2, 0)
    quantized, name = calibrate(network, latent_adapter, recipe, data, 0, T).network, "middle_block.0"

    def guided():
        both = [torch.stack([network(x, t.expand(2), c) for x, t in zip(xs, T, strict=True)]) for c in (cs, ucs)]
        return both[1] + 3 * (both[0] - both[1])

    plain = guided()
    network.set_submodule(name, quantized.get_submodule(name))
    differences = guided() - plain
    u = found.units.index(name)
    assert torch.allclose(found.single[u, 0], differences.square().mean((1, 2, 3, 4)), rtol=1e-9)
    end = torch.einsum("s,s...->...", Path.coefficients[-1], differences)
    assert torch.allclose(found.end[u, 0], end.square().mean(), rtol=1e-9)


def test_costs_are_known_without_measuring(measured):
    network, recipes, found, rollouts, data = measured
    costs = unit_costs(network, ADAPTER, recipes, data, T)
    assert costs.units == found.units and torch.equal(costs.products, found.products)
    for b, recipe in enumerate(recipes.values()):
        quantized = calibrate(network, ADAPTER, recipe, data, 0, T).network
        stored = [_stored_bytes(quantized.get_submodule(name)) for name in costs.units]
        assert costs.stored[:, b].tolist() == stored


def test_units_are_all_that_is_quantized_in_the_order_of_execution(measured):
    network, recipes, found, _, data = measured
    quantized = calibrate(network, ADAPTER, recipes[3], data, 0, T).network
    assert sorted(name for names in found.layers for name in names) == sorted(quant_layers(quantized))
    assert found.units[:3] == ("temb.dense.0", "temb.dense.1", "conv_in") and found.units[-1] == "conv_out"
    assert (found.end[:, 0] > found.end[:, 1]).all()  # three bits cost more than eight


def weight_bytes(state):
    """Of codes, scales and zero points of weights, these as a float32 network stores them."""
    found = {k: v for k, v in state.items() if k.endswith(".codes") or "weight_quantizer" in k or "weight_zero" in k}
    return sum(v.numel() * (4 if v.is_floating_point() else v.element_size()) for v in found.values())


def test_stored_bytes_are_those_of_the_checkpoint(measured):
    network, recipes, found, _, data = measured
    for column, recipe in enumerate(recipes.values()):
        state = packed_state(calibrate(network, ADAPTER, recipe, data, 0, T).network)
        assert found.stored[:, column].sum() == weight_bytes(state)


def test_products_of_a_convolution_and_a_linear_layer(measured):
    found = measured[2]
    by_unit = dict(zip(found.units, found.products.tolist(), strict=True))
    assert by_unit["conv_in"] == 8 * 8 * 32 * 3 * 9 and by_unit["temb.dense.1"] == 128 * 128


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_the_choice_is_the_best_of_all(units, widths, seed):
    generator = np.random.default_rng(seed)
    errors = generator.random((units, widths))
    costs = generator.integers(1, 50, (units, widths))
    cheapest = int(costs.min(1).sum())
    budget = cheapest + int(generator.integers(0, 60))
    rows = np.arange(units)
    fitting = [c for c in itertools.product(range(widths), repeat=units) if costs[rows, c].sum() <= budget]
    chosen = allocate(errors, costs, budget)
    assert costs[rows, chosen].sum() <= budget
    assert errors[rows, chosen].sum() == pytest.approx(min(errors[rows, c].sum() for c in fitting))


def test_a_large_budget_is_kept_though_it_is_rounded():
    generator = np.random.default_rng(0)
    errors, costs = generator.random((30, 6)), generator.integers(10**6, 10**8, (30, 6))
    budget = int(costs.mean(1).sum())
    chosen = allocate(errors, costs, budget)
    assert costs[np.arange(30), chosen].sum() <= budget
    with pytest.raises(ValueError, match="expected at least"):
        allocate(errors, costs, int(costs.min(1).sum()) - 1)
    with pytest.raises(ValueError, match="finite errors"):
        allocate(np.full((1, 1), np.nan), np.ones((1, 1), int), 5)


def test_the_mixed_recipe_calibrates_and_is_stored_at_the_chosen_widths(measured):
    network, recipes, found, _, data = measured
    bits = [8 if unit.startswith("up") else 3 for unit in found.units]
    recipe = mixed_recipe(recipes[3], found, bits)
    assert recipe == type(recipe).from_dict(recipe.to_dict()) and recipe.name == "nearest, mixed"
    quantized = calibrate(network, ADAPTER, recipe, data, 0, T).network
    for name, layer in quant_layers(quantized).items():
        assert layer.weight_quantizers[0].spec.bits == (8 if name.startswith("up") else 3), name
    columns = [found.bits.index(width) for width in bits]
    assert found.stored[range(len(bits)), columns].sum() == weight_bytes(packed_state(quantized))


def test_bit_operations():
    assert bit_operations(10, 4, 8) == 640 and bit_operations(10, 4, 32) == 20 * 4 * 23


def test_a_heat_map_of_two_panels(tmp_path):
    values = np.array([[1.0, 0.0], [np.nan, 10.0]])
    panels = [Panel("a", values, ["1", "2"]), Panel("b", values[:, :1], ["1"])]
    heat_map(panels, ["x", "y"], "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"expected values \[1, 2\], found \[2, 2\]"):
        heat_map(panels, ["x"], "title", tmp_path / "b.png")
    with pytest.raises(ValueError, match="expected some positive value"):
        heat_map([replace(panels[0], values=-values)], ["x", "y"], "title", tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()
