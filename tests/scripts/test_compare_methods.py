"""compare_methods.py: one table, one picture, one checkpoint per method; benchmark.py: ratios and their JSON file."""

import json
import re

import pytest
import torch
import yaml
from PIL import Image
from running import call, launch, passed, refused, tree

from qdiff.checkpoints import load_checkpoint

COMPARE = "compare_methods"
# Three steps of four images, which is what the float sampling states are for too.
SHORT = ("--timesteps", 4, "--cali_st", 2, "--cali_n", 2, "--n_samples", 4)
KEYS = {"method", "weight_bits", "act_bits", "psnr_db", "fd", "bytes"}


@pytest.fixture(scope="module")
def compared(tiny32, tmp_path_factory):
    """The Result and the output folder of a comparison in a process of its own, from elsewhere."""
    folder = tmp_path_factory.mktemp("compared")
    flags = ("--methods", "nearest", "gptq", "quick:2", "q-diffusion:2", "--weight_bit", 8, 4, "--a_sym", "--split")
    return passed(launch(COMPARE, *tiny32.model, *SHORT, *flags, "--outdir", "out", cwd=folder)), folder / "out"


def test_what_it_writes(compared):
    result, out = compared
    names = [f"{method}_w{bits}a8" for method in ("nearest", "gptq", "quick-2", "q-diffusion-2") for bits in (4, 8)]
    checkpoints = [f"{name}.safetensors" for name in names]
    assert sorted(tree(out)) == sorted([*checkpoints, "comparison.png", "results.json", "results.md"])
    table = (out / "results.md").read_text()
    assert table in result.out and "out/comparison.png, on cpu, 1 threads" in result.out
    assert len(table.splitlines()) == 2 + 9
    assert (out / "run.log").is_file()


def test_the_results(compared):
    results = json.loads((compared[1] / "results.json").read_text())
    assert results.keys() == {"seconds", "rows"} and results["seconds"] > 0
    rows = results["rows"]
    assert [(row["method"], row["weight_bits"]) for row in rows] == [
        ("float", 32),
        *((method, bits) for bits in (8, 4) for method in ("nearest", "gptq", "quick", "q-diffusion")),
    ]
    for row in rows:
        assert row.keys() >= KEYS
        assert isinstance(row["fd"], float) and row["fd"] > 0 and isinstance(row["bytes"], int)
        assert (row["psnr_db"] is None) == (row["method"] == "float")
    assert {row["act_bits"] for row in rows} == {8, 32}
    psnr = {(row["method"], row["weight_bits"]): row["psnr_db"] for row in rows}
    assert all(psnr[method, 8] > psnr[method, 4] for method in ("nearest", "gptq", "quick", "q-diffusion"))


def test_the_sizes_are_those_of_the_files(compared):
    _, out = compared
    rows = json.loads((out / "results.json").read_text())["rows"]
    for row in rows[1:]:
        name = f"{row['label'].replace(':', '-')}_w{row['weight_bits']}a{row['act_bits']}.safetensors"
        assert row["bytes"] == (out / name).stat().st_size
        assert load_checkpoint(out / name).recipe.weights.bits == row["weight_bits"]
    assert rows[4]["bytes"] < 0.35 * rows[0]["bytes"]


def test_the_picture(compared):
    with Image.open(compared[1] / "comparison.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.height >= 9 * 96 and picture.width >= 4 * 96


def test_the_same_comparison_gives_the_same_images(tiny32, compared, tmp_path):
    """Part of it again, in this process: the same numbers and the same checkpoint."""
    passed(call(COMPARE, *tiny32.model, *SHORT, "--methods", "gptq", "--a_sym", "--split", "--outdir", tmp_path))
    (row,) = (row for row in json.loads((tmp_path / "results.json").read_text())["rows"] if row["method"] == "gptq")
    (other,) = (
        row
        for row in json.loads((compared[1] / "results.json").read_text())["rows"]
        if (row["method"], row["weight_bits"]) == ("gptq", 4)
    )
    assert {key: row[key] for key in KEYS} == {key: other[key] for key in KEYS}
    name = "gptq_w4a8.safetensors"
    assert (tmp_path / name).read_bytes() == (compared[1] / name).read_bytes()


def test_weights_alone_and_images_of_another_size(tiny, tmp_path):
    """32 stands for float activations; the Fréchet distance is of 32-pixel images only."""
    flags = ("--methods", "nearest", "--act_bit", 32, "--outdir", tmp_path)
    passed(call(COMPARE, *tiny.model, *SHORT, *flags))
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["act_bits"], row["fd"]) for row in rows] == [(32, None), (32, None)]
    assert load_checkpoint(tmp_path / "nearest_w4a32.safetensors").recipe.activations is None


def test_a_dry_run_prints_every_recipe_and_writes_nothing(tiny, tmp_path):
    flags = ("--methods", "quick:3", "nearest", "--dry_run", "--outdir", "out")
    plan = yaml.safe_load(passed(call(COMPARE, *tiny.model, *SHORT, *flags)).out)
    assert list(plan["runs"]) == ["quick-3_w4a8", "nearest_w4a8"] and tree(tmp_path) == {}
    stages = {stage["stage"]: stage for stage in plan["runs"]["quick-3_w4a8"]["stages"]}
    assert stages["reconstruct"]["iterations"] == 3


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--methods", "magic"), ("--methods magic", "nearest", "q-diffusion")),
        (("--methods", "quick:0"), ("--methods quick:0", "METHOD:ITERATIONS")),
        (("--methods", "quick:many"), ("--methods quick:many",)),
        (("--methods", "nearest", "quick:"), ("--methods quick:",)),
        (("--methods",), ("--methods",)),
        (("--weight_bit", 4, 1), ("--weight_bit", "'1'")),
        (("--act_bit", 16), ("--act_bit 16", "32 for float")),
        (("--sm_abit", 17), ("--sm_abit", "'17'")),
        (("--n_samples", 1), ("--n_samples", "at least 2")),
        (("--cali_n", 0), ("--cali_n", "at least 1")),
        (("--cali_st", 5), ("--cali_st 5", "4 steps")),
        (("--timesteps", 2000), ("--timesteps 2000",)),
        (("--device", "nonsense"), ("--device nonsense",)),
        (("--ckpt", "nope.pt"), ("nope.pt",)),
        (("--outdir", "a-file/out"), ("a-file/out",)),
    ],
    ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") and len(value) < 4 else "",
)
def test_bad_input(tiny, tmp_path, flags, names):
    (tmp_path / "a-file").touch()
    result = call(COMPARE, *tiny.model, *SHORT, "--outdir", "out", *flags)
    refused(result, *names)
    assert result.bars == [] and tree(tmp_path) == {"a-file": b""}


# benchmark.py

BENCHMARK = ("--batch_size", 2, "--repeats", 2)


def test_benchmark(tiny, tmp_path):
    flags = ("simulate", *tiny.model, *BENCHMARK, "--json", "new/out.json")
    result = passed(launch("benchmark", *flags, cwd=tmp_path))
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    assert [row["what"] for row in found["rows"]] == ["float", "simulated W4", "simulated W4A8"]
    assert found["rows"][0]["ratio"] == 1 and all(row["milliseconds"] > 0 for row in found["rows"])
    assert (found["device"], found["batch_size"]) == ("cpu", 2) and found["torch"] == torch.__version__
    assert len(re.findall(r"\| simulated W4\w* +\| +[\d.]+ \| +\d+\.\d\d \|", result.out)) == 2
    assert "time / float time" in result.out and list(tree(tmp_path)) == ["new", "new/out.json"]


def test_benchmark_of_other_bits(tiny):
    result = passed(call("benchmark", "simulate", *tiny.model, *BENCHMARK, "--weight_bit", 8, "--act_bit", 4))
    assert "simulated W8A4" in result.out


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ((), ("command", "required")),
        (("fly",), ("fly", "simulate")),
        (("simulate",), ("--config", "required")),
        (("simulate", "model", "--repeats", 0), ("--repeats", "'0'")),
        (("simulate", "model", "--batch_size", "x"), ("--batch_size", "'x'")),
        (("simulate", "model", "--weight_bit", 9), ("--weight_bit", "'9'")),
        (("simulate", "model", "--rep", 3), ("--rep",)),
        (("simulate", "model", "--json", "a-file/out.json"), ("a-file",)),
        (("simulate", "model", "--device", "nonsense"), ("--device nonsense",)),
        (("simulate", "model", "--ckpt", "nope.pt"), ("nope.pt",)),
    ],
    ids=lambda value: "_".join(map(str, value)) if "simulate" in value[:1] else "",
)
def test_benchmark_with_bad_input(tiny, tmp_path, flags, names):
    (tmp_path / "a-file").touch()
    flags = [part for flag in flags for part in (tiny.model if flag == "model" else (flag,))]
    refused(call("benchmark", *flags), *names)
    assert tree(tmp_path) == {"a-file": b""}


def test_benchmark_dry_run(tiny, tmp_path):
    plan = yaml.safe_load(passed(call("benchmark", "simulate", *tiny.model, "--dry_run")).out)
    assert plan["torch"] == torch.__version__ and tree(tmp_path) == {}
