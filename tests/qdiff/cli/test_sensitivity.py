"""sensitivity.py: a table of all units, a picture, and a recipe that calibrates within the budget."""

import csv
import json

import pytest
from running import call, passed, refused

from qdiff.recipes.recipe import Recipe

SHORT = ("--timesteps", 3, "--cali_st", 2, "--cali_n", 2, "--n_samples", 2, "--bits", 2, 4, 8, "--outdir", "out")


def test_a_recipe_within_the_budget_of_uniform_weights(tiny, tmp_path):
    result = passed(call("sensitivity", *tiny.model, *SHORT, "--split", "--a_sym", "--method", "nearest"))
    found = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    with (tmp_path / "out" / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(found["chosen"]) and rows[0].keys() == found["rows"][0].keys()
    assert {row["bits"] for row in rows} == {"2", "4", "8"} and found["act_bits"] == 8
    by_unit = {(row["unit"], row["bits"]): row for row in found["rows"]}
    uniform = sum(by_unit[unit, 4]["stored_bytes"] for unit in found["chosen"])
    chosen = sum(by_unit[unit, bits]["stored_bytes"] for unit, bits in found["chosen"].items())
    assert 0.97 * uniform < chosen <= uniform and len(set(found["chosen"].values())) > 1
    assert (tmp_path / "out" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    recipe = Recipe.load(tmp_path / "out" / "recipe.yml")
    assert recipe.name == "nearest, mixed" and recipe.activations.kind == "signed" and recipe.split_shortcuts
    assert "uniform W4: " in result.out and "recipe.yml" in result.out


@pytest.mark.parametrize("flags", [("--budget_gbops", 1e9), ("--budget_mib", 100)], ids=lambda flags: flags[0])
def test_what_a_budget_allows(tiny, tmp_path, flags):
    """More than enough: every unit at the bits that err least."""
    passed(call("sensitivity", *tiny.model, *SHORT, "--act_bit", 32, *flags))
    found = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    errors = {unit: {} for unit in found["chosen"]}
    for row in found["rows"]:
        errors[row["unit"]][row["bits"]] = row["rms_at_the_end"]
    assert found["chosen"] == {unit: min(of, key=of.get) for unit, of in errors.items()}


def test_a_conditional_model_with_guidance(latent, tmp_path):
    prompt = ("--prompt", "a cat", "--scale", 3)
    passed(call("sensitivity", "-r", latent.sd.ckpt, *prompt, *SHORT, "--bits", 4, 8, "--timesteps", 4))
    assert len(json.loads((tmp_path / "out" / "sensitivity.json").read_text())["timesteps"]) == 4


def test_a_budget_that_nothing_fits_is_refused_before_units_are_measured(tiny, tmp_path):
    result = call("sensitivity", *tiny.model, *SHORT, "--budget_mib", 0.001)
    refused(result, "--budget_mib 0.001")
    assert result.bars == ["calibration data"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--budget_mib", 0.001), ("--budget_mib 0.001: expected at least", "fewest bits")),
        (("--budget_gbops", 1e-6), ("--budget_gbops 1e-06: expected at least",)),
        (("--weight_bit", 3), ("--weight_bit 3: expected one of --bits 2 4 8",)),
        (("--act_bit", 12), ("--act_bit 12: expected 2 to 8, or 32",)),
        (("--cali_st", 4), ("--cali_st 4: --timesteps makes only 3 steps",)),
        (("--sample_type", "ddpm_noisy"), ("--sample_type ddpm_noisy: clips",)),
        (("--budget_mib", 1, "--budget_gbops", 1), ("--budget_gbops", "not allowed with")),
    ],
)
def test_bad_input(tiny, flags, parts):
    refused(call("sensitivity", *tiny.model, *SHORT, *flags), *parts)
