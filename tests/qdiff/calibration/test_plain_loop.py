"""Whole calibrations with the frontier, at any memory limit, against the plain loop that runs every prefix anew."""

import copy
import gc
import statistics

import pytest
import torch

from qdiff.calibration.calibrate import RunOptions, calibrate
from qdiff.calibration.frontier import BaselineFrontier, Frontier
from qdiff.calibration.store import MemoryLimits
from qdiff.methods import MethodOptions, make_recipe
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.recipes.recipe import QuantSpec, Recipe
from qdiff.recipes.stages import Learn, RangeSpec, Reconstruct, WeightRanges

FEW = {"iterations": 3, "act_iterations": 2, "batch_size": 6, "weight_range": "minmax", "act_range": "minmax"}
# Adam divides gradients by their own size, so the last digits of one that is nearly zero become digits of a step.
CLOSE = 1e-6
LONG = [("q-diffusion", "ldm"), ("quick", "ldm"), ("q-diffusion", "ddim")]
CASES = [("quick", "ddim"), *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
ONE_LEVEL = {"ch_mult": [1], "attn_resolutions": [8]}


class Uneven(BaselineFrontier):
    """The plain loop, with batches of another size: float sums come out a little different."""

    def __init__(self, network, adapter, data, batch_size=16, store=None):
        super().__init__(network, adapter, data, 7, store)


# Compensated rounding turns any change of sums into other codes near ties, and those into other numbers from there on.
PLAIN = {"quick": BaselineFrontier, "q-diffusion": Uneven}


@pytest.fixture(scope="module")
def run(make_network, adapter, states, make_latent, latent_adapter, latent_states, timesteps):
    """(method, family, dtype, how it is carried out) -> the calibration."""

    def calibrated(method, family, dtype, **options):
        recipe = make_recipe(
            method, MethodOptions(4, 8, split=True, family="latent" if family == "ldm" else "pixel", **FEW)
        )
        if family == "ddim":
            arguments = make_network(32, **ONE_LEVEL).to(dtype), adapter, recipe, states
        else:
            sizes = {"model_channels": 32, "channel_mult": [1], "attention_resolutions": [1]}
            network = make_latent("transformer", **sizes).to(dtype)
            arguments = network, latent_adapter, recipe, latent_states("transformer")
        return calibrate(*arguments, 0, timesteps, options=RunOptions(**options))

    return calibrated


def assert_close(run, other, tolerance):
    """The same codes; scales and biases as close as said."""
    layers, others = quant_layers(run.network), quant_layers(other.network)
    for name, layer in layers.items():
        assert torch.equal(layer.codes, others[name].codes), name
        for mine, theirs in zip(layer.parameters(), others[name].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    quantizers = act_quantizers(other.network)
    for name, quantizer in act_quantizers(run.network).items():
        torch.testing.assert_close(quantizer.scale, quantizers[name].scale, rtol=tolerance, atol=0)
        assert torch.equal(quantizer.zero_point, quantizers[name].zero_point), name


@pytest.fixture
def without_collections():
    """States are freed by the last reference to them, or not at all."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("method", "family"), CASES)
def test_codes_and_scales_are_the_plain_loops_at_any_memory_limit(
    run, assert_same_numbers, without_collections, method, family, tmp_path
):
    plain, found = (run(method, family, torch.float64, frontier=kind) for kind in (PLAIN[method], Frontier))
    assert {p.dtype for p in found.network.parameters()} == {torch.float64}
    assert_close(found, plain, CLOSE)
    for mine, theirs in zip(found.reports, plain.reports, strict=True):
        assert (mine.unit, mine.kept) == (theirs.unit, theirs.kept)
        assert (mine.before, mine.after) == pytest.approx((theirs.before, theirs.after), rel=CLOSE)
    peak = found.store.peak["host"]
    limit = 0 if method == "q-diffusion" else peak // 3
    limited = run(method, family, torch.float64, memory=MemoryLimits(host=limit), scratch=tmp_path)
    assert_same_numbers(limited.network, found.network)  # bit for bit
    assert limited.store.peak["host"] <= limit and limited.store.peak["disk"] > 0
    assert list(tmp_path.iterdir()) == []
    assert limited.store.used == found.store.used == {"device": 0, "host": 0, "disk": 0}


@pytest.mark.long
def test_losses_in_float32_are_the_plain_loops(run):
    """Of the other methods and networks float64 says more, above."""
    plain, found = (run("q-diffusion", "ldm", torch.float32, frontier=kind) for kind in (Uneven, Frontier))
    for mine, theirs in zip(found.reports, plain.reports, strict=True):
        assert mine.losses[-1][1] == pytest.approx(theirs.losses[-1][1], rel=0.01), mine.unit


# Products in half precision


@pytest.fixture(scope="module")
def learned(make_network, adapter, states):
    """(how it is carried out) -> a calibration that learns rounding, biases and nothing else."""
    learn = {"rounding": Learn(0.05, "cosine"), "bias": Learn(1e-3)}
    stage = Reconstruct(learn, iterations=12, batch_size=8)
    recipe = Recipe("w4", QuantSpec(4, axis="out_channel"), stages=(WeightRanges(RangeSpec()), stage))
    network = make_network(32, **ONE_LEVEL)
    return lambda **options: calibrate(
        copy.deepcopy(network), adapter, recipe, states, 0, options=RunOptions(**options)
    )


@pytest.mark.long
def test_products_in_half_precision_learn_too(learned):
    """They are full ones unless asked for."""
    half, full = learned(products="bfloat16"), learned()
    assert RunOptions().products == "float32"
    assert {p.dtype for p in half.network.parameters()} == {torch.float32}
    falls = [statistics.mean(loss for _, loss in r.losses[-5:]) < r.losses[0][1] for r in half.reports]
    assert sum(falls) > 0.9 * len(falls)
    assert sum(r.after < r.before for r in half.reports) > 0.8 * len(half.reports)
    for mine, theirs in zip(half.reports, full.reports, strict=True):
        assert mine.losses != theirs.losses and mine.after < 1.3 * theirs.after, mine.unit
