"""--set: what a path changes, what it leaves alone, and what is said about a wrong one; then as a flag."""

from dataclasses import replace

import pytest

from qdiff.cli.parser import make_parser
from qdiff.cli.recipe_flags import QuantizationOptions, add_quantization_flags, chosen_recipe
from qdiff.methods import MethodOptions, make_recipe
from qdiff.recipes.overrides import apply_overrides
from qdiff.recipes.recipe import QuantSpec, Recipe, Rule, Selector, StepGroups
from qdiff.recipes.stages import (
    GPTQ,
    ActivationRanges,
    Learn,
    RangeSpec,
    Reconstruct,
    RoundingPenalty,
    WeightRanges,
)

W, A = Reconstruct({"rounding": Learn(1e-3)}, 7, penalty=RoundingPenalty()), Reconstruct({"scale": Learn(4e-4)}, 9)
BASE = Recipe(
    "base",
    QuantSpec(4, "affine", "out_channel"),
    QuantSpec(8),
    rules=(Rule("conv_in", 8), Rule("conv_out", 8)),
    stages=(WeightRanges(), W, ActivationRanges(), A),
)


def stages(*changed, weights=None, activations=None):
    """BASE with other stages in the places of its learned ones."""
    first, second = changed
    ranges = ActivationRanges() if activations is None else activations
    return replace(BASE, stages=(weights or WeightRanges(), first, ranges, second))


CHANGES = {
    "field": (["weights.bits=3"], replace(BASE, weights=replace(BASE.weights, bits=3))),
    "flag": (["split_shortcuts=true"], replace(BASE, split_shortcuts=True)),
    "list": (["compat=[train_mode]"], replace(BASE, compat=("train_mode",))),
    "mapping": (["selector={name: group_starts, steps: 3}"], replace(BASE, selector=Selector("group_starts", 3))),
    "null": (["activations=null"], replace(BASE, activations=None)),
    "several": (
        ["selector.name=density_variety", "selector.per_step=4", "step_groups.size=5"],
        replace(BASE, selector=Selector("density_variety", per_step=4), step_groups=StepGroups(size=5)),
    ),
    "all-of-a-stage": (["reconstruct.iterations=3"], stages(replace(W, iterations=3), replace(A, iterations=3))),
    "one-of-a-stage": (["reconstruct[2].iterations=3"], stages(W, replace(A, iterations=3))),
    "only-one": (["weight_ranges[1].range.finder=theta"], stages(W, A, weights=WeightRanges(RangeSpec("theta")))),
    "learned-by-some": (["reconstruct.learn.scale.rate=1e-4"], stages(W, replace(A, learn={"scale": Learn(1e-4)}))),
    "added": (
        ["reconstruct[1].learn.bias={rate: 1, schedule: cosine}"],
        stages(replace(W, learn={**W.learn, "bias": Learn(1.0, "cosine")}), A),
    ),
    "added-field-by-field": (
        ["reconstruct.learn.bias.schedule=cosine", "reconstruct.learn.bias.rate=2"],
        stages(*(replace(s, learn={**s.learn, "bias": Learn(2.0, "cosine")}) for s in (W, A))),
    ),
    "removed": (["reconstruct.learn.scale=null"], stages(W, replace(A, learn={}))),
    "penalty-of-some": (
        ["reconstruct.penalty.warmup=0.5"],
        stages(replace(W, penalty=RoundingPenalty(warmup=0.5)), A),
    ),
    "made": (["reconstruct[2].penalty.weight=0.5"], stages(W, replace(A, penalty=RoundingPenalty(0.5)))),
    "made-where-all-lack-it": (
        ["activation_ranges.softmax.aggregate=ema"],
        stages(W, A, activations=ActivationRanges(softmax=RangeSpec(aggregate="ema"))),
    ),
    "null-softmax": (["softmax.bits=16"], replace(BASE, softmax=QuantSpec(16, "unsigned"))),
    "all-rules": (["rules.act_bits=6"], replace(BASE, rules=(Rule("conv_in", 8, 6), Rule("conv_out", 8, 6)))),
    "one-rule": (["rules[2].one_set=yes"], replace(BASE, rules=(BASE.rules[0], Rule("conv_out", 8, one_set=True)))),
    "an-equals-sign-in-the-value": (["name=a=b"], replace(BASE, name="a=b")),
    "the-last-one-holds": (["weights.bits=3", "weights.bits=5"], replace(BASE, weights=replace(BASE.weights, bits=5))),
    "nothing": ([], BASE),
}


@pytest.mark.parametrize(("assignments", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_path_changes_what_it_names_and_nothing_else(assignments, expected):
    before = BASE.to_dict()
    assert apply_overrides(BASE, assignments) == expected
    assert BASE.to_dict() == before


def test_numbers_have_the_type_of_their_field():
    changed = apply_overrides(BASE, ["reconstruct[1].learn.rounding.rate=1", "reconstruct[2].mix=1e-1"])
    assert isinstance(changed.stages[1].learn["rounding"].rate, float) and changed.stages[3].mix == 0.1


def test_values_that_need_one_another_come_in_any_order():
    grouped = replace(BASE, step_groups=StepGroups(4))
    for assignments in (["step_groups.size=5", "step_groups.count=1"], ["step_groups.count=1", "step_groups.size=5"]):
        assert apply_overrides(grouped, assignments).step_groups == StepGroups(size=5)


def test_a_value_for_several_stages_is_each_ones_own():
    changed = apply_overrides(BASE, ["reconstruct.penalty={weight: 0.5}", "reconstruct[2].penalty.weight=0.25"])
    assert [changed.stages[i].penalty.weight for i in (1, 3)] == [0.5, 0.25]


FIELDS = "expected one of name, weights, .*, compat, weight_ranges, reconstruct, activation_ranges, found"
MISTAKES = {
    "stage": ("rekonstruct.iterations=1", f"changes rekonstruct.iterations: {FIELDS} 'rekonstruct'"),
    "absent-stage": (
        "rollout.gradient=exact",
        "changes rollout.gradient: the recipe has no rollout, its stages are weight_ranges, reconstruct, ",
    ),
    "field": ("weights.bit=4", "changes weights.bit: expected one of bits, kind, axis, found 'bit'"),
    "inner-field": (
        "reconstruct.loss.q=4",
        "changes reconstruct.loss.q: expected one of p, taps, reduction, found 'q'",
    ),
    "too-deep": ("weights.bits.low=4", "changes weights.bits.low: bits has no fields"),
    "no-value": ("weights.bits", "changes: expected PATH=VALUE, .*found 'weights.bits'"),
    "no-path": ("=4", "changes: expected PATH=VALUE, .*found '=4'"),
    "dots": ("weights..bits=4", "changes weights..bits: expected names joined by dots"),
    "no-yaml": ("selector={name", "changes selector: expected YAML, found '{name'"),
    "type": ("weights.bits=four", "changes weights.bits: recipe.weights.bits: expected int, found 'four'"),
    "bounds": ("weights.bits=9", r"changes weights.bits: recipe: weights.bits: expected a value from 2 to 8, found 9"),
    "null": ("weights.bits=", "changes weights.bits: recipe.weights.bits: expected int, found None"),
    "choice": ("selector.name=best", "changes selector.name: recipe.selector: selector: expected one of uniform"),
    "word-for-a-list": ("compat=train_mode", "changes compat: recipe.compat: expected a list, found 'train_mode'"),
    "group": (
        "reconstruct.learn.mean.rate=1",
        r"changes reconstruct.learn.mean.rate: .*expected one of rounding, scale",
    ),
    "no-rate": ("reconstruct.learn.bias.schedule=cosine", "changes .*schedule: .*field rate is missing"),
    "not-learned": (
        "reconstruct.learn.bias=null",
        "changes .*: nothing to remove, expected one of rounding, scale, found",
    ),
    "kind-of-stage": ("reconstruct.stage=compensate", "changes reconstruct.stage: expected one of learn, iterations"),
    "whole-stage": (
        "reconstruct[1]=null",
        r"changes reconstruct\[1\]: expected a field of it, as reconstruct\[1\].learn",
    ),
    "stages": ("stages=[]", f"changes stages: {FIELDS} 'stages'"),
    "whole-rule": ("rules[1]={pattern: a}", r"changes rules\[1\]: expected a field of rules\[1\]"),
    "no-such-occurrence": (
        "reconstruct[3].mix=1",
        r"changes reconstruct\[3\].mix: expected reconstruct\[1\] to reconstruct\[2\], found reconstruct\[3\]",
    ),
    "counted-from-0": (
        "reconstruct[0].mix=1",
        r".*expected reconstruct\[1\] to reconstruct\[2\], found reconstruct\[0\]",
    ),
    "entry-of-a-field": ("weights[1].bits=4", r"changes weights\[1\].bits: weights has no entries"),
}


@pytest.mark.parametrize(("assignment", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_one_line_that_names_the_path(assignment, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        apply_overrides(BASE, [assignment])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["weights.bits=9", "selector.steps=3"], "changes weights.bits: "),
        (["selector.steps=3", "weights.bits=9"], "changes weights.bits: "),
        (["step_groups.count=4", "step_groups.size=5"], "changes step_groups.size: .*found count 4 and size 5"),
        (["rules=3", "rules.act_bits=4"], "changes rules.act_bits: rules has no fields, since it was set to 3"),
        (["rules=[3]", "rules.act_bits=4"], "changes rules.act_bits: rules has no fields, since it was set to 3"),
        (["selector=3", "selector.steps=4"], "changes selector.steps: selector has no fields, since it was set to 3"),
    ],
)
def test_of_several_the_one_at_fault_is_named(assignments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        apply_overrides(BASE, assignments)


def test_a_recipe_without_rules_or_stages_says_so():
    with pytest.raises(ValueError, match="changes rules.act_bits: the recipe has no rules$"):
        apply_overrides(Recipe("x"), ["rules.act_bits=4"])
    with pytest.raises(ValueError, match="changes compensate.rows: the recipe has no compensate$"):
        apply_overrides(Recipe("x"), ["compensate.rows=4"])


# As a flag


def recipe_of(*flags):
    parser = make_parser("")
    add_quantization_flags(parser)
    return chosen_recipe(QuantizationOptions.of(parser.parse_args([str(flag) for flag in flags])))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(BASE.to_yaml(), encoding="utf8")
    return path


def test_the_flag_is_given_several_values_and_several_times():
    flags = ("--method", "quick", "--weight_bit", 4, "--quant_act")
    more = ("--set", "reconstruct.iterations=100", "selector.name=density_variety", "--set", "weights.bits=3")
    expected = make_recipe("quick", MethodOptions(3, 8))
    expected = replace(expected, selector=replace(expected.selector, name="density_variety"))
    expected = apply_overrides(expected, ["reconstruct.iterations=100"])
    assert recipe_of(*flags, *more) == expected


def test_the_flag_comes_last_of_all(file):
    flags = ("--recipe", file, "--weight_bit", 5, "--cali_n", 6)
    assert recipe_of(*flags) == replace(
        BASE, weights=replace(BASE.weights, bits=5), selector=replace(BASE.selector, per_step=6)
    )
    assert recipe_of(*flags, "--set", "weights.bits=3", "compat=[train_mode]") == replace(
        BASE,
        weights=replace(BASE.weights, bits=3),
        selector=replace(BASE.selector, per_step=6),
        compat=("train_mode",),
    )
    assert recipe_of("--cali_iters", 3, "--set", "reconstruct.iterations=4").stages[1].iterations == 4


@pytest.mark.parametrize("name", ["uniform", "group_starts", "density_variety"])
def test_calibration_states_given_beside_a_recipe_are_of_its_selector(file, name):
    flags = ("--recipe", file, "--set", f"selector={{name: {name}, steps: 9, per_step: 9, variety: 2}}")
    plain = recipe_of(*flags)
    file.write_text(plain.to_yaml(), encoding="utf8")
    found = recipe_of("--recipe", file, "--cali_st", 3, "--cali_n", 4)
    assert found.selector == Selector(name, 3, 4, variety=2.0)


def test_stages_are_checked_as_they_are_in_the_end(file):
    with pytest.raises(ValueError, match=r"^--set: stages\[1\]: expected activation_ranges before reconstruct"):
        recipe_of("--quant_act", "--set", "reconstruct[1].learn.scale.rate=1")
    with pytest.raises(ValueError, match="^--set: stages: expected activation_ranges among them"):
        recipe_of("--method", "nearest", "--set", "activations.bits=8")
    unordered = replace(BASE, stages=(WeightRanges(), GPTQ(), A, ActivationRanges()))
    file.write_text(unordered.to_yaml(), encoding="utf8")
    with pytest.raises(ValueError, match=rf"^{file}: stages\[2\]: expected activation_ranges before reconstruct"):
        recipe_of("--recipe", file)
    with pytest.raises(ValueError, match=rf"^{file} with --set: stages\[2\]: "):
        recipe_of("--recipe", file, "--set", "weights.bits=4")
    learned = recipe_of("--recipe", file, "--set", "reconstruct.learn={bias: {rate: 1}}").stages[2].learn
    assert learned == {"bias": Learn(1.0)}


def test_the_flag_is_refused_beside_a_checkpoint_that_is_used_as_it_is(tmp_path):
    flags = ("--quant_act", "--cali_ckpt", tmp_path / "ckpt.pth", "--set", "reconstruct.iterations=4")
    with pytest.raises(ValueError, match=r"^--set: changes a calibration, and --cali_ckpt .*ckpt.pth is used as it is"):
        recipe_of(*flags)
    assert recipe_of(*flags, "--resume_w").stages[-1].iterations == 4
