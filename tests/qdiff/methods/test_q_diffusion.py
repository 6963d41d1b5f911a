"""Q-Diffusion's range rules per model family (docs/methods.md §1.1), and the flags that choose among them."""

from dataclasses import replace

import pytest
import torch

from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.selectors import CalibrationSet
from qdiff.cli.parser import make_parser
from qdiff.cli.recipe_flags import QuantizationOptions, add_quantization_flags, chosen_recipe
from qdiff.methods import MethodOptions, make_recipe
from qdiff.recipes.stages import ActivationRanges, RangeSpec, Reconstruct, WeightRanges

FAMILIES = ("pixel", "latent", "text")
PARSER = make_parser("")
add_quantization_flags(PARSER)


def recipe(*flags, family="latent"):
    args = PARSER.parse_args(["--ptq", "--quant_act", *map(str, flags)])
    args.family = family
    return chosen_recipe(QuantizationOptions.of(args))


def ranges(*flags, family="latent"):
    """The one stage that finds activation ranges."""
    [stage] = [s for s in recipe(*flags, family=family).stages if isinstance(s, ActivationRanges)]
    return stage


def spec(finder, aggregate, size):
    return RangeSpec(finder, aggregate=aggregate, prefix="quantized", batch_size=size)


@pytest.mark.parametrize(("family", "finder"), [("pixel", "minmax"), ("latent", "shrink"), ("text", "shrink")])
def test_weight_ranges(family, finder):
    assert recipe(family=family).stages[0] == WeightRanges(RangeSpec(finder))
    assert recipe("--a_min_max", family=family).stages[0] == WeightRanges(RangeSpec(finder))


EXPECTED = [
    # CIFAR-10: 64 states at random, minimum and maximum
    ("pixel", [], ActivationRanges(spec("minmax", "first", 64), inputs="random", samples=64)),
    # LSUN-Church: the search, on 64 states; of all steps where B4 is mended
    ("latent", [], ActivationRanges(spec("shrink", "first", 64), inputs="stratified", samples=64)),
    (
        "latent",
        ["--compat", "first_step_ranges"],
        ActivationRanges(spec("shrink", "first", 64), inputs="first", samples=64),
    ),
    # LSUN-Bedroom: --a_sym --a_min_max --running_stat
    ("latent", ["--a_sym", "--a_min_max", "--running_stat"], ActivationRanges(spec("minmax", "ema", 64))),
    ("latent", ["--a_min_max"], ActivationRanges(spec("minmax", "first", 64), inputs="stratified", samples=64)),
    ("latent", ["--running_stat"], ActivationRanges(spec("shrink", "ema", 64))),
    # Stable Diffusion: 16 states at random, the search and its moving average
    ("text", [], ActivationRanges(spec("shrink", "first", 16), inputs="random", samples=16)),
    ("text", ["--running_stat"], ActivationRanges(spec("shrink", "ema", 16))),
    ("text", ["--rs_sm_only"], ActivationRanges(spec("shrink", "first", 16), softmax=spec("shrink", "ema", 16))),
    # B4 is a fault of the latent script alone
    (
        "text",
        ["--compat", "first_step_ranges"],
        ActivationRanges(spec("shrink", "first", 16), inputs="random", samples=16),
    ),
    (
        "pixel",
        ["--compat", "first_step_ranges"],
        ActivationRanges(spec("minmax", "first", 64), inputs="random", samples=64),
    ),
]


@pytest.mark.parametrize(
    ("family", "flags", "expected"),
    EXPECTED,
    ids=lambda v: v if isinstance(v, str) else "".join(v) if isinstance(v, list) else "",
)
def test_activation_ranges(family, flags, expected):
    assert ranges(*flags, family=family) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_moving_averages_of_softmax_alone_win_over_those_of_all(family):
    both = ranges("--rs_sm_only", "--running_stat", family=family)
    assert both == ranges("--rs_sm_only", family=family) != ranges("--running_stat", family=family)
    assert both.range.aggregate == "first" and both.softmax.aggregate == "ema" and both.inputs == "all"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_depend_on_the_family(family):
    found = recipe("--cali_st", 3, "--cali_n", 5, family=family)
    [weights, scales] = [stage for stage in found.stages if isinstance(stage, Reconstruct)]
    assert (weights.inputs, weights.loss.p, weights.iterations, weights.batch_size) == ("quantized", 2.0, 20000, 32)
    assert (scales.inputs, scales.loss.p, scales.iterations, scales.batch_size) == ("float", 2.4, 5000, 32)
    assert (found.selector.steps, found.selector.per_step) == (3, 5)
    assert found.softmax.kind == "unsigned" and found.softmax.bits == 8


@pytest.mark.parametrize("method", ["nearest", "nearest-lp", "gptq", "quick"])
def test_simpler_methods_know_no_families_but_take_a_min_max(method):
    options = MethodOptions(act_bits=8)
    assert make_recipe(method, options) == make_recipe(method, replace(options, family="text"))
    assert ranges("--method", method, "--a_min_max").range.finder == "minmax"


# What the stages do


@pytest.fixture
def data(timesteps):
    """80 states, eight of each step; those of a step are wider than the ones before."""
    x = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    step = torch.arange(10).repeat_interleave(8)
    return CalibrationSet(x * (1 + step.view(-1, 1, 1, 1)), timesteps[step].float(), step)


def input_scale(make_latent, latent_adapter, timesteps, data, *flags):
    """The grid of the network's first convolution, whose inputs are the states themselves, after the range stages."""
    found = recipe("--a_sym", *flags)
    stages = tuple(stage for stage in found.stages if not isinstance(stage, Reconstruct))
    network = make_latent("plain", model_channels=32)
    run = calibrate(network, latent_adapter, replace(found, stages=stages), data, 0, timesteps)
    return run.network.input_blocks[0][0].act_quantizer


def test_ranges_of_latent_models_come_from_all_steps_unless_the_fault_is_asked_for(
    make_latent, latent_adapter, timesteps, data
):
    """64 of 80 states spread over the steps hold the widest; the first 64 end two steps before."""
    for flags, x in ([], data.x[torch.arange(64) * 80 // 64]), (["--compat", "first_step_ranges"], data.x[:64]):
        quantizer = input_scale(make_latent, latent_adapter, timesteps, data, "--a_min_max", *flags)
        torch.testing.assert_close(quantizer.scale.data, x.abs().max().view(1) / 127)


def test_moving_averages_of_softmax_alone(make_latent, latent_adapter, timesteps, data):
    """The network's inputs then keep the range of the first batch of 64; states are walked in their order here."""
    flags = ("--a_min_max", "--compat", "ordered_ema")
    first, moving = (
        input_scale(make_latent, latent_adapter, timesteps, data, *flags, flag)
        for flag in ("--rs_sm_only", "--running_stat")
    )
    torch.testing.assert_close(first.scale.data, data.x[:64].abs().max().view(1) / 127)
    lows, highs = zip(*((x.min(), x.max()) for x in (data.x[:64], data.x[64:])), strict=True)
    low, high = (0.95 * a + 0.05 * b for a, b in (lows, highs))
    torch.testing.assert_close(moving.scale.data, torch.maximum(low.abs(), high.abs()).view(1) / 127)
    assert moving.scale > 1.001 * first.scale
