"""Descriptions: what they refuse, and that recipes survive YAML."""

from dataclasses import MISSING, fields, is_dataclass, replace

import pytest
import yaml

from qdiff.methods import METHODS, MethodOptions
from qdiff.recipes.recipe import AXES, COMPAT, KINDS, QuantSpec, Recipe, Rule, Selector, StepGroups
from qdiff.recipes.stages import (
    GPTQ,
    RANGE_FINDERS,
    STAGES,
    ActivationRanges,
    CorrectBias,
    Finetune,
    Learn,
    Loss,
    RangeSpec,
    Reconstruct,
    Rollout,
    RoundingPenalty,
    WeightRanges,
)

OPTIONS = {
    "w8": MethodOptions(),
    "w4a8-sym-split": MethodOptions(weight_bits=4, act_bits=8, act_symmetric=True, softmax_bits=16, split=True),
    "every-option": MethodOptions(
        weight_bits=3,
        act_bits=6,
        selector_steps=7,
        per_step=5,
        batch_size=3,
        iterations=11,
        act_iterations=13,
        act_rate=1e-5,
        loss_p=1.5,
        running_stat=True,
        weight_range="theta",
        act_range="percentile",
        rounding_start="gptq",
        compat=tuple(COMPAT),
    ),
}
# A value other than the default in every field.
EVERYTHING = Recipe(
    "everything",
    QuantSpec(3, "signed", "tensor"),
    QuantSpec(6, "unsigned_mid", "in_channel"),
    QuantSpec(16, "unsigned"),
    True,
    (Rule("conv_*", 8, 0), Rule("temb.*", act_bits=4), Rule("role:time", one_set=True)),
    Selector("density_variety", 7, 5, 0.25, 2.0, 32),
    StepGroups(1, "hold", 4, 10),
    (
        WeightRanges(RangeSpec("theta", 50, 2.0)),
        GPTQ(0.02, 100, 64, 8),
        ActivationRanges(
            RangeSpec("percentile", None, 3.0, "ema", 0.9, "quantized", 64, 500), RangeSpec(), "random", 32
        ),
        Reconstruct(
            {"rounding": Learn(0.5, "cosine"), "scale": Learn(1e-5, relative=True), "bias": Learn(1e-3)},
            11,
            3,
            "mixed",
            0.25,
            0.5,
            Loss(2.4, 0.8, "mean"),
            RoundingPenalty(0.1, 0.3, 10.0, 3.0),
            "better",
            2.0,
        ),
        CorrectBias(8),
        Finetune(("role:attention", "mid.*"), {"scale": Learn(1e-4)}, "rest", 30, 4, 0.5, 1.0, "sequential", 3, 16),
        Rollout({"scale": Learn(1e-4)}, 30, 4, 64, "unrolled", False, "quantized", keep="always"),
        Rollout({"rounding": Learn(1e-2)}, 30, order="interleaved", penalty=RoundingPenalty(), sharpen=8.0),
    ),
    tuple(COMPAT),
)


def through_yaml(recipe):
    return Recipe.from_dict(yaml.safe_load(recipe.to_yaml()))


# Grids


@pytest.mark.parametrize(
    ("kind", "qmin", "qmax"),
    [("affine", 0, 255), ("signed", -128, 127), ("unsigned", 0, 255), ("unsigned_mid", 0, 255)],
)
def test_limits_of_the_codes_follow_from_bits_and_kind(kind, qmin, qmax):
    spec = QuantSpec(8, kind)
    assert (spec.qmin, spec.qmax) == (qmin, qmax)
    assert (replace(spec, bits=4).qmin, replace(spec, bits=4).qmax) == {-128: (-8, 7), 0: (0, 15)}[qmin]


# YAML


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_recipes_of_every_method_survive_yaml(method, options):
    recipe = METHODS[method](options)
    assert recipe.stages and through_yaml(recipe) == recipe


def test_every_field_survives_yaml(tmp_path):
    assert through_yaml(EVERYTHING) == EVERYTHING
    grouped = replace(EVERYTHING, step_groups=StepGroups(4, "hold"))
    assert through_yaml(grouped) == grouped
    (tmp_path / "recipe.yaml").write_text(EVERYTHING.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == EVERYTHING


def test_fields_left_out_are_the_defaults_and_whole_numbers_do_for_floats():
    recipe = Recipe.from_dict({"name": "short", "stages": [{"stage": "reconstruct", "loss": {"p": 2}}]})
    assert recipe == Recipe("short", stages=(Reconstruct(),))
    assert isinstance(recipe.stages[0].loss.p, float)


# Mistakes in YAML


def changed(**fields):
    return {"name": "x", **fields}


MISTAKES = {
    "field": (changed(weight={"bits": 4}), "recipe: field: expected one of name, weights, .*found 'weight'"),
    "inner-field": (
        changed(weights={"bit": 4}),
        "recipe.weights: field: expected one of bits, kind, axis, found 'bit'",
    ),
    "stage": (
        changed(stages=[{"stage": "range"}]),
        r"recipe.stages\[0\]: stage: expected one of weight_ranges, compensate, .*, finetune, rollout, found 'range'",
    ),
    "no-stage": (changed(stages=[{"iterations": 3}]), r"recipe.stages\[0\]: stage: expected one of .*found None"),
    "stage-field": (
        changed(stages=[{"stage": "compensate", "iterations": 3}]),
        r"recipe.stages\[0\]: field: expected one of damping, rows, block, batch_size, found 'iterations'",
    ),
    "kind": (
        changed(weights={"bits": 4, "kind": "int"}),
        "recipe.weights: kind: expected one of affine, .*found 'int'",
    ),
    "axis": (
        changed(weights={"bits": 4, "axis": "row"}),
        "recipe.weights: axis: expected one of tensor, .*found 'row'",
    ),
    "finder": (
        changed(stages=[{"stage": "weight_ranges", "range": {"finder": "mse"}}]),
        r"recipe.stages\[0\].range: range finder: expected one of minmax, shrink, theta, percentile, found 'mse'",
    ),
    "learned": (
        changed(stages=[{"stage": "reconstruct", "learn": {"weight": {"rate": 1.0}}}]),
        r"recipe.stages\[0\]: learned parameter group: expected one of rounding, scale, bias, found 'weight'",
    ),
    "schedule": (
        changed(stages=[{"stage": "reconstruct", "learn": {"scale": {"rate": 1.0, "schedule": "step"}}}]),
        r"recipe.stages\[0\].learn.scale: learning-rate schedule: expected one of constant, cosine, found 'step'",
    ),
    "compat": (changed(compat=["b1"]), "recipe: compat option: expected one of raw_min_range, .*found 'b1'"),
    "selector": (
        changed(selector={"name": "tdac"}),
        "recipe.selector: selector: expected one of uniform, density_variety, group_starts, found 'tdac'",
    ),
    "finetuned": (
        changed(stages=[{"stage": "finetune", "learn": {"rounding": {"rate": 1.0}}}]),
        r"recipe.stages\[0\]: finetuned parameter group: expected one of weight, scale, found 'rounding'",
    ),
    "finetuned-layers": (
        changed(stages=[{"stage": "finetune", "layers": "role:time"}]),
        r"recipe.stages\[0\].layers: expected a list, found 'role:time'",
    ),
    "rolled-out": (
        changed(stages=[{"stage": "rollout", "learn": {"weight": {"rate": 1.0}}}]),
        r"recipe.stages\[0\]: learned parameter group: expected one of rounding, scale, bias, found 'weight'",
    ),
    "role": (
        changed(rules=[{"pattern": "role:first"}]),
        r"recipe.rules\[0\]: role: expected one of input, output, time, .*found 'first'",
    ),
    "one-set": (
        changed(rules=[{"pattern": "a", "one_set": 1}]),
        r"recipe.rules\[0\].one_set: expected bool, found 1",
    ),
    "lookup": (
        changed(step_groups={"lookup": "next"}),
        "recipe.step_groups: step_groups lookup: expected one of nearest, hold, found 'next'",
    ),
    "bits": (
        changed(weights={"bits": 9}),
        r"recipe: weights.bits: expected a value from 2 to 8, found 9",
    ),
    "one-bit": (changed(weights={"bits": 1}), "recipe.weights: bits: expected a value from 2 to 16, found 1"),
    "act-bits": (changed(activations={"bits": 16}), r"recipe: activations.bits: .*found 16"),
    "rule-bits": (
        changed(rules=[{"pattern": "conv_in", "weight_bits": 1}]),
        r"recipe.rules\[0\]: rule conv_in: weight_bits: .*found 1",
    ),
    "a-string": (changed(weights={"bits": "4"}), "recipe.weights.bits: expected int, found '4'"),
    "a-fraction": (changed(weights={"bits": 4.5}), "recipe.weights.bits: expected int, found 4.5"),
    "a-boolean": (changed(weights={"bits": True}), "recipe.weights.bits: expected int, found True"),
    "a-number": (changed(split_shortcuts=1), "recipe.split_shortcuts: expected bool, found 1"),
    "nan": (
        changed(stages=[{"stage": "reconstruct", "learn": {"scale": {"rate": float("nan")}}}]),
        r"recipe.stages\[0\].learn.scale: learning rate: expected a value from 0.0 to 1000.0, found nan",
    ),
    "mapping": (changed(weights=4), "recipe.weights: expected a mapping, found 4"),
    "list-for-a-mapping": (
        changed(stages=[{"stage": "reconstruct", "learn": ["scale"]}]),
        r"recipe.stages\[0\].learn: expected a mapping, found \['scale'\]",
    ),
    "mapping-for-a-list": (changed(stages={"stage": "compensate"}), "recipe.stages: expected a list, found {'stage'"),
    "word-for-a-list": (changed(compat="train_mode"), "recipe.compat: expected a list, found 'train_mode'"),
    "number-for-a-list": (changed(stages=3), "recipe.stages: expected a list, found 3"),
    "null-for-a-list": (changed(rules=None), "recipe.rules: expected a list, found None"),
    "missing": (changed(weights={"kind": "affine"}), "recipe.weights: field bits is missing"),
    "nameless": ({"split_shortcuts": True}, "recipe: field name is missing"),
    "not-a-mapping": ("q-diffusion", "recipe: expected a mapping, found 'q-diffusion'"),
    "empty": (None, "recipe: expected a mapping, found None"),
    "numbered-key": ({1: 2, "name": "x"}, "recipe: field: expected one of name, .*found 1"),
}


@pytest.mark.parametrize(("plain", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_recipe_names_its_place_and_what_is_valid(plain, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        Recipe.from_dict(plain)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["name: [", "name: x\nweights: {bits: 17}", "\x00", "- a\n- b", ""],
    ids=["yaml", "value", "nul", "list", "empty"],
)
def test_a_bad_recipe_file_is_named_in_one_line(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        Recipe.load(path)
    assert str(error.value).startswith(f"{path}: not a recipe: ") and "\n" not in str(error.value)


def test_a_recipe_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ValueError, match="not a recipe"):
        Recipe.load(path)


# Mistakes in Python


OUT_OF_BOUNDS = [
    (lambda: QuantSpec(17), "bits: .*found 17"),
    (lambda: Recipe("x", QuantSpec(4, axis="in_channel")), "weights axis: expected tensor or out_channel"),
    (lambda: RangeSpec(aggregate="last"), "aggregate: expected one of first, ema, all, found 'last'"),
    (lambda: RangeSpec(prefix="mixed"), "prefix: expected one of quantized, float"),
    (lambda: RangeSpec(momentum=1.5), "momentum: .*found 1.5"),
    (lambda: RangeSpec(batch_size=0), "batch_size: .*found 0"),
    (lambda: RangeSpec(candidates=0), "candidates: .*found 0"),
    (lambda: RangeSpec(sample=0), "range sample: .*found 0"),
    (lambda: RangeSpec(p=0.0), "range p: .*found 0.0"),
    (lambda: Selector(steps=0), "selector.steps: .*found 0"),
    (lambda: Selector(per_step=0), "selector.per_step: .*found 0"),
    (lambda: Selector(radius=-1.0), "selector.radius: .*found -1.0"),
    (lambda: Selector(variety=-1.0), "selector.variety: .*found -1.0"),
    (lambda: Selector(features=0), "selector.features: .*found 0"),
    (lambda: StepGroups(0), "step_groups.count: .*found 0"),
    (lambda: StepGroups(size=0), "step_groups.size: .*found 0"),
    (lambda: StepGroups(hold_every=0), "step_groups.hold_every: .*found 0"),
    (lambda: StepGroups(4, size=5), "expected count or size, found count 4 and size 5"),
    (lambda: GPTQ(damping=0.0), "damping: .*found 0.0"),
    (lambda: GPTQ(block=0), "block: .*found 0"),
    (lambda: GPTQ(batch_size=0), "batch_size: .*found 0"),
    (lambda: ActivationRanges(inputs="last"), "inputs: expected one of all, random, stratified, first"),
    (lambda: ActivationRanges(samples=0), "samples: .*found 0"),
    (lambda: Reconstruct(iterations=0), "iterations: .*found 0"),
    (lambda: Reconstruct(inputs="both"), "inputs: expected one of float, quantized, mixed, found 'both'"),
    (lambda: Reconstruct(mix=1.5), "mix: .*found 1.5"),
    (lambda: Reconstruct(drop=-0.5), "drop: .*found -0.5"),
    (lambda: Reconstruct(keep="best"), "keep: expected one of always, better, found 'best'"),
    (lambda: Loss(p=0.0), "loss p: .*found 0.0"),
    (lambda: Loss(reduction="sum"), "loss reduction: expected one of channel_sum, mean"),
    (lambda: Loss(taps=-1.0), "loss taps: .*found -1.0"),
    (lambda: RoundingPenalty(warmup=1.5), "warmup: .*found 1.5"),
    (lambda: RoundingPenalty(weight=-1.0), "penalty weight: .*found -1.0"),
    (lambda: RoundingPenalty(beta_end=0.0), "beta_end: .*found 0.0"),
    (lambda: CorrectBias(0), "correct_bias batch_size: .*found 0"),
    (lambda: Finetune(()), "finetune layers: expected at least one"),
    (lambda: Finetune(("conv_in", "role:x")), "role: expected one of input, .*found 'x'"),
    (lambda: Finetune(scales="some"), "finetune scales: expected one of layers, rest, all, found 'some'"),
    (lambda: Finetune(order="random"), "finetune order: expected one of interleaved, sequential, found 'random'"),
    (lambda: Finetune(iterations=0), "finetune iterations: .*found 0"),
    (lambda: Finetune(batch_size=0), "finetune batch_size: .*found 0"),
    (lambda: Finetune(iterations=5, rounds=6), "finetune rounds: expected a value from 1 to 5, found 6"),
    (lambda: Finetune(local=-1.0), "finetune local: .*found -1.0"),
    (lambda: Finetune(output=-1.0), "finetune output: .*found -1.0"),
    (lambda: Finetune(per_step=0), "finetune per_step: .*found 0"),
    (lambda: Rollout(iterations=0), "rollout iterations: .*found 0"),
    (lambda: Rollout(batch_size=0), "rollout batch_size: .*found 0"),
    (lambda: Rollout(samples=0), "rollout samples: .*found 0"),
    (lambda: Rollout(gradient="full"), "rollout gradient: expected one of two_pass, exact, unrolled, found 'full'"),
    (lambda: Rollout(start="noise"), "rollout start: expected one of float, quantized, found 'noise'"),
    (lambda: Rollout(order="random"), "rollout order: expected one of sequential, interleaved, found 'random'"),
    (lambda: Rollout(keep="best"), "rollout keep: expected one of always, better, found 'best'"),
    (lambda: Rollout(sharpen=0.5), "rollout sharpen: .*found 0.5"),
    (lambda: Rollout({"bias": Learn(1.0)}), "rollout learn: with order sequential only scale can be learned"),
    (lambda: Rollout(start="quantized", order="interleaved"), "rollout start quantized: needs order sequential"),
]


@pytest.mark.parametrize(
    ("build", "message"), OUT_OF_BOUNDS, ids=[message.split(":")[0] for _, message in OUT_OF_BOUNDS]
)
def test_a_value_out_of_bounds_is_refused_where_it_is_given(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_registries_are_what_the_error_messages_offer():
    assert KINDS and AXES and RANGE_FINDERS
    for name, kind in STAGES.items():
        assert Recipe.from_dict({"name": "x", "stages": [{"stage": name}]}).stages == (kind(),)


def parts_of(value):
    """The dataclasses in a recipe, itself among them."""
    if is_dataclass(value):
        yield value
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from parts_of(item)


def test_the_example_has_every_stage_and_a_value_other_than_the_default_in_every_field():
    """Otherwise a field that YAML loses would go unnoticed."""
    changed = {}
    for part in (*parts_of(EVERYTHING), StepGroups(4)):  # count and size exclude one another
        for field in fields(part):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            differs = getattr(part, field.name) != default
            changed.setdefault(type(part), {}).setdefault(field.name, []).append(differs)
    assert changed.keys() >= set(STAGES.values())
    assert {
        (kind, name) for kind, names in changed.items() for name, differ in names.items() if not any(differ)
    } == set()


def test_samples_that_a_selector_takes():
    assert Selector("uniform", 7, 5).seeds == Selector("group_starts", 7, 5).seeds == 5
    assert Selector("density_variety", 7, 5).seeds == 35


def test_step_groups_of_a_size_follow_from_the_steps():
    assert [StepGroups(size=5).sets(steps) for steps in (1, 5, 6, 20, 21)] == [1, 1, 2, 4, 5]
    assert [StepGroups(3).sets(steps) for steps in (3, 20)] == [3, 3]


def test_a_rule_may_name_a_role_of_the_network():
    roles = {"input": ("conv_in",), "output": ("conv_out",)}
    recipe = Recipe("x", QuantSpec(4), QuantSpec(6), rules=(Rule("role:input", 8, 8), Rule("role:output", act_bits=0)))
    assert recipe.layer_specs("conv_in", roles) == (QuantSpec(8), QuantSpec(8))
    assert recipe.layer_specs("conv_out", roles) == (QuantSpec(4), None)
    assert recipe.layer_specs("mid", roles) == recipe.layer_specs("conv_in") == (QuantSpec(4), QuantSpec(6))


def test_later_rules_win_and_a_rule_says_nothing_of_what_it_leaves_out():
    recipe = Recipe(
        "x", QuantSpec(4, "signed", "tensor"), QuantSpec(8), rules=(Rule("a*", 8, 0), Rule("*b", weight_bits=3))
    )
    assert recipe.layer_specs("c") == (QuantSpec(4, "signed", "tensor"), QuantSpec(8))
    assert recipe.layer_specs("a") == (QuantSpec(8, "signed", "tensor"), None)
    assert recipe.layer_specs("ab") == (QuantSpec(3, "signed", "tensor"), None)
    assert recipe.layer_specs("b") == (QuantSpec(3, "signed", "tensor"), QuantSpec(8))


def test_patterns_tell_small_letters_from_capitals():
    assert Rule("A*").matches("Ab") and not Rule("a*").matches("Ab")


def test_a_printed_plan_is_read_for_the_recipe_it_holds(tmp_path):
    recipe = METHODS["quick"](MethodOptions(weight_bits=3, act_bits=8))
    plan = tmp_path / "plan.yml"
    plan.write_text(yaml.safe_dump({"images": 4, "recipe": recipe.to_dict()}), encoding="utf8")
    assert Recipe.load(plan) == recipe
