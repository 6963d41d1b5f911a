"""Whole calibrations of small latent networks: every method, both kinds of attention, conditional pairs."""

from dataclasses import replace

import pytest
import torch

from ldm.pipeline import Conditioning, Pipeline
from ldm.schedules import beta_schedule
from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.frontier import Frontier
from qdiff.calibration.rollout import Rollouts
from qdiff.calibration.selectors import CalibrationSet, select
from qdiff.calibration.trajectories import Recorder
from qdiff.methods import METHODS, MethodOptions, make_recipe
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.recipes.recipe import QuantSpec, Recipe
from qdiff.recipes.stages import ActivationRanges, CorrectBias, Learn, RangeSpec, Reconstruct, WeightRanges

FORMS = ["plain", "transformer", "labels"]
NARROW = {"model_channels": 32, "channel_mult": [1], "attention_resolutions": [1]}
FEW = {"iterations": 2, "act_iterations": 2, "batch_size": 8, "weight_range": "minmax", "act_range": "minmax"}
W4 = MethodOptions(weight_bits=4, family="latent", **FEW)
W4A8 = replace(W4, act_bits=8, split=True, selector_steps=10)  # all that there are: QuEST has a set for each
BETAS = beta_schedule("linear", 1000, 0.0015, 0.0195)
WEIGHTS, ACTS = WeightRanges(RangeSpec()), ActivationRanges(RangeSpec())
BASE = Recipe("base", QuantSpec(4, axis="out_channel"), QuantSpec(8), split_shortcuts=True, stages=(WEIGHTS, ACTS))


@pytest.fixture
def run(make_latent, latent_adapter, latent_states, timesteps):
    """(recipe, form) -> the calibration of a fresh network."""

    def calibrated(recipe, form, seed=0, data=None):
        data = latent_states(form) if data is None else data
        return calibrate(make_latent(form, **NARROW), latent_adapter, recipe, data, seed, timesteps)

    return calibrated


def predict(network, data):
    with torch.no_grad():
        return network(data.x, data.t, *([] if data.context is None else [data.context]))


def relative(network, plain, data):
    expected = predict(plain, data)
    return ((predict(network, data) - expected).norm() / expected.norm()).item()


def units_of(adapter, network):
    return [segment.name for segment in adapter.chain(network) if quant_layers(segment.module)]


@pytest.mark.parametrize(
    ("method", "form", "options"),
    [
        *((method, "transformer", W4A8) for method in METHODS if method != "accuquant"),
        ("gptq", "plain", W4A8),
        ("q-diffusion", "labels", W4A8),
        ("quick", "transformer", W4),
        ("q-diffusion", "plain", W4),
    ],
    ids=lambda value: value if isinstance(value, str) else "w4" if value is W4 else "w4a8",
)
@pytest.mark.cases(
    "nearest-lp-transformer-w4a8",
    "eda-dm-transformer-w4a8",
    "quest-transformer-w4a8",
    "gptq-plain-w4a8",
    "q-diffusion-labels-w4a8",
    "q-diffusion-plain-w4",
)
def test_every_method_calibrates_every_layer(
    quantized_latent, make_latent, latent_adapter, latent_states, method, form, options
):
    network = quantized_latent(make_recipe(method, options), form, **NARROW)
    plain, data = make_latent(form, **NARROW), latent_states(form)
    assert_calibrated(network, plain, latent_adapter, options)
    assert 0.01 < relative(network, plain, data) < 0.5


def assert_calibrated(network, plain, adapter, options):
    """Every layer, split and attention operand has its grid, and nothing is left to learn."""
    assert all(layer.frozen for layer in quant_layers(network).values())
    layers = [n for n, m in plain.named_modules() if isinstance(m, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Linear))]
    assert list(quant_layers(network)) == layers
    quantizers = act_quantizers(network)
    assert all(q.enabled and q.scale.isfinite().all() for q in quantizers.values())
    split = len(adapter.split_boundaries(plain)) if options.split else 0
    products = len(adapter.attention_products(plain))
    assert len(quantizers) == (len(layers) + split + 4 * products if options.act_bits else 0)
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("form", ["transformer", "labels"])
@pytest.mark.cases("labels")
def test_accuquant_calibrates_every_layer_on_guided_trajectories(make_latent, latent_adapter, latent_states, form):
    """Eight steps: a group of five, and one of the three that are left."""
    plain, context = make_latent(form, **NARROW), latent_states(form).context
    context, unconditional = context[:2], context[-2:]
    pipeline, recorder = Pipeline((3, 8, 8), BETAS, steps=8, eta=1.0, scale=2.0), Recorder()
    pipeline.sample(plain, range(2), Conditioning(context, unconditional), recorder.add)
    trajectories = recorder.trajectories(cs=context, ucs=unconditional)
    options = replace(W4A8, selector_steps=2, per_step=2, batch_size=2)
    recipe = make_recipe("accuquant", options)
    data, rollouts = select(trajectories, recipe), Rollouts(trajectories, pipeline.path())
    arguments = (plain, latent_adapter, recipe, data, 0, trajectories.timesteps)
    network = calibrate(*arguments, rollouts=rollouts).network
    assert_calibrated(network, plain, latent_adapter, options)
    assert network.step_table.groups_of(trajectories.timesteps).tolist() == [0] * 5 + [1] * 3
    assert all(len(quantizer.scale) == 2 for quantizer in act_quantizers(network).values())
    assert 0.01 < relative(network, plain, data) < 0.5


@pytest.mark.parametrize("method", ["quick", "q-diffusion"])
@pytest.mark.cases("quick")
def test_a_seed_determines_every_bit(quantized_latent, run, assert_same_numbers, method):
    recipe = make_recipe(method, W4A8)
    torch.manual_seed(5)
    assert_same_numbers(run(recipe, "transformer").network, quantized_latent(recipe, "transformer", **NARROW))


@pytest.mark.parametrize("form", ["plain", "transformer"])
@pytest.mark.cases("plain")
def test_quick_is_better_than_rounding_to_nearest(make_latent, run, latent_states, form):
    """On states it was not shown, in the whole network's prediction."""
    options = MethodOptions(weight_bits=4, act_bits=8, family="latent", iterations=8, batch_size=8)
    known, plain = latent_states(form), make_latent(form, **NARROW)
    x = torch.randn(known.x.shape, generator=torch.Generator().manual_seed(3))
    unseen = CalibrationSet(x, known.t, known.step, known.context)
    errors = {m: relative(run(make_recipe(m, options), form).network, plain, unseen) for m in ("nearest", "quick")}
    assert errors["quick"] < 0.9 * errors["nearest"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.cases("transformer", "labels")
def test_every_unit_learns_in_both_stages(latent_adapter, run, form):
    """None is skipped: in each the codes of every layer move, and the scale of every quantizer of at most 8 bits.

    Of layers that the norms cancel there is nothing to learn: with one channel to a group, what the time embedding
    adds to whole channels is taken out again, unless it scales them too.
    """
    rounding = Reconstruct({"rounding": Learn(1.0)}, iterations=3, batch_size=8)
    scales = Reconstruct({"scale": Learn(1e-2)}, iterations=2, batch_size=8, inputs="float")
    softmax = QuantSpec(16 if form == "transformer" else 8, "unsigned")
    base = replace(BASE, softmax=softmax)
    result = run(replace(base, stages=(WEIGHTS, rounding, ACTS, scales)), form)
    units = units_of(latent_adapter, result.network)
    assert [(report.stage, report.unit) for report in result.reports] == [(s, u) for s in (1, 3) for u in units]
    assert len(units) >= 10 and all(len(report.losses) > 1 for report in result.reports)
    nearest, before = (run(replace(base, stages=s), form).network for s in ((WEIGHTS,), (WEIGHTS, rounding, ACTS)))
    cancelled = "" if form == "labels" else "emb_layers"
    for name, layer in quant_layers(result.network).items():
        moved = not torch.equal(layer.codes, quant_layers(nearest)[name].codes)
        assert moved or cancelled and cancelled in name, name
        assert torch.equal(layer.codes, quant_layers(before)[name].codes), name
    for name, quantizer in act_quantizers(result.network).items():
        moved = not torch.equal(quantizer.scale, act_quantizers(before)[name].scale)
        if not (cancelled and cancelled in name):
            assert moved == (quantizer.spec.bits <= 8), name
        assert torch.equal(quantizer.zero_point, act_quantizers(before)[name].zero_point), name
    fixed = [name for name, q in act_quantizers(result.network).items() if q.spec.bits == 16]
    assert len(fixed) == (8 if form == "transformer" else 0)


@pytest.mark.parametrize("form", ["transformer"])
def test_learning_lowers_the_errors_of_units(run, form):
    stage = Reconstruct({"rounding": Learn(0.05), "bias": Learn(1e-2)}, iterations=15, batch_size=16)
    reports = run(replace(BASE, stages=(WEIGHTS, ACTS, stage)), form).reports
    assert sum(report.after < report.before for report in reports) > 0.8 * len(reports)


def test_activation_ranges_cover_both_embeddings(run, latent_states):
    """The keys' and values' inputs are the context itself, and the unconditional half is the wider one here."""
    data = latent_states("transformer")
    wide = replace(data, context=data.context * torch.tensor([1.0] * 10 + [5.0] * 10).view(20, 1, 1))
    network = run(BASE, "transformer", data=wide).network
    low, high = wide.context.min(), wide.context.max()
    assert high == wide.context[10:].max() > 2 * wide.context[:10].max()
    attention = network.middle_block[1].transformer_blocks[0].attn2
    for layer in (attention.to_k, attention.to_v):
        torch.testing.assert_close(layer.act_quantizer.scale.data, ((high - low) / 255).view(1))
    assert attention.to_q.act_quantizer.scale != attention.to_k.act_quantizer.scale


@pytest.mark.long
def test_what_a_network_is_conditioned_on_changes_its_calibration(run, latent_states):
    recipe = make_recipe("gptq", W4A8)
    data = latent_states("transformer")
    other = replace(data, context=data.context.square())
    mine, theirs = (quant_layers(run(recipe, "transformer", data=d).network) for d in (data, other))
    differs = [name for name in mine if not torch.equal(mine[name].codes, theirs[name].codes)]
    assert "time_embed.0" not in differs and "input_blocks.0.0" not in differs
    assert "input_blocks.1.1.transformer_blocks.0.attn2.to_k" in differs and "out.2" in differs


@pytest.mark.parametrize("form", ["transformer", "labels"])
def test_bias_correction_leaves_no_mean_error(make_latent, latent_adapter, run, latent_states, form):
    """Tokens have their channels last, images second."""
    network = run(replace(BASE, stages=(WEIGHTS, ACTS, CorrectBias())), form).network
    data = latent_states(form)
    plain, quantized = (Frontier(n, latent_adapter, data) for n in (make_latent(form, **NARROW), network))
    for name in units_of(latent_adapter, network):
        error = quantized.outputs(name) - plain.outputs(name)
        axis = 1 if error.dim() == 4 else -1
        assert error.movedim(axis, -1).flatten(0, -2).mean(0).abs().max() < 1e-5, name
