"""benchmark.py run: every network in one table, with both baselines, and what does not work said beside the others."""

import json

import pytest
import torch
import yaml
from running import call, passed, refused, tree
from torch import nn

from qdiff.checkpoints.native import load_checkpoint
from qdiff.cli.benchmark.run import Row, table, weight_bytes
from qdiff.evaluation.cost import float_bytes

SHORT = ("run", "--batch_size", 2, "--repeats", 1)


def measured(tmp_path, *flags):
    """The rows of a run by their names, all that it wrote, and its standard output."""
    result = passed(call("benchmark", *SHORT, *flags, "--json", "new/out.json"))
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    return {row["what"]: row for row in found["runs"]}, found, result.out


def test_a_pixel_model(tiny, tmp_path):
    flags = ("--runtimes", "half", "simulate", "integer", "onnx", "auto", "--weight_bit", 4, "--split")
    rows, found, out = measured(tmp_path, *tiny.model, *flags)
    kinds = [f"{name} W4A8" for name in ("simulate", "integer", "onnx", "auto")]
    assert list(rows) == ["float32 eager", "bfloat16 eager", *kinds]
    assert not any("note" in row for row in rows.values()), rows
    base = rows["float32 eager"]
    for name, row in rows.items():
        assert row["per_second"] == pytest.approx(2000 / row["milliseconds"])
        assert row["to_float32"] == pytest.approx(base["milliseconds"] / row["milliseconds"])
        assert "to_compiled" not in row and f"| {name} " in out
    assert base["file_ratio"] == 1 and rows["bfloat16 eager"]["file_ratio"] == 2
    assert rows["simulate W4A8"]["file_mib"] == rows["onnx W4A8"]["file_mib"] < base["file_mib"] / 5
    assert rows["bfloat16 eager"]["weights_mib"] == base["weights_mib"] / 2 and base["weights_mib"] == base["file_mib"]
    assert rows["integer W4A8"]["weights_mib"] < base["weights_mib"] / 5 < rows["simulate W4A8"]["weights_mib"]
    assert any("taking" in line for line in found["auto"]) and "throughput / float32" in out
    assert (found["device"], found["batch_size"]) == ("cpu", 2) and list(tree(tmp_path)) == ["new", "new/out.json"]


def test_a_calibrated_file_and_its_memory(tiny, calibrated, tmp_path, monkeypatch):
    def here(work, *arguments):  # a process of its own takes seconds to start
        work(*arguments)
        return {"seconds": 1.0, "peak_gib": {abs: 0.5}.get(work, 0.75)}

    monkeypatch.setattr("qdiff.cli.benchmark.run.in_own_process", here)
    path = calibrated.folder / "ckpt.safetensors"
    flags = ("--cali_ckpt", path, "--runtimes", "half", "integer", "--attention", "float", "--memory")
    rows, found, _ = measured(tmp_path, *tiny.model, *flags)
    assert list(rows) == ["float32 eager", "bfloat16 eager", "integer W4A8"]
    assert rows["integer W4A8"]["file_mib"] == path.stat().st_size / 2**20
    assert found["libraries_peak_mib"] == 512 and all(row["peak_mib"] == 768 for row in rows.values())


def test_latent_models(latent, tmp_path):
    rows, *_ = measured(tmp_path, "-r", latent.cin.ckpt, "--runtimes", "simulate")
    assert list(rows) == ["float32 eager", "simulate W8A8", "simulate W4A8"]
    assert rows["simulate W8A8"]["file_ratio"] < rows["simulate W4A8"]["file_ratio"]
    rows, *_ = measured(tmp_path, "--config", latent.sd.config, "--random", "--runtimes", "integer", "--weight_bit", 8)
    assert list(rows) == ["float32 eager", "integer W8A8"] and not any("note" in row for row in rows.values())


def test_what_does_not_work_is_said_in_its_row(tiny, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("\nno C++ compiler was found\nsecond line")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr("qdiff.deploy.runtime.has_onnx_runtime", lambda: False)
    flags = ("--runtimes", "half-compiled", "onnx", "--weight_bit", 8, "--half", "float16", "--compile_modes")
    rows, _, out = measured(tmp_path, *tiny.model, *flags, "default", "max-autotune")
    names = ["float32 eager", "float16 compiled", "float16 compiled (max-autotune)", "onnx W8A8"]
    assert list(rows) == names and "milliseconds" in rows["float32 eager"]
    for name in names[1:3]:
        assert rows[name]["note"] == "does not run: no C++ compiler was found" and "milliseconds" not in rows[name]
    assert "pip install '.[onnx]'" in rows["onnx W8A8"]["note"] and "does not run: no C++ compiler" in out


def test_compiled_networks_are_a_baseline(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)  # compiling takes a minute
    rows, *_ = measured(tmp_path, *tiny.model, "--runtimes", "float32-compiled", "half-compiled", "simulate")
    fastest = min(rows[name]["milliseconds"] for name in ("float32 compiled", "bfloat16 compiled"))
    for row in rows.values():
        assert row["to_compiled"] == pytest.approx(fastest / row["milliseconds"])


def test_the_table_without_running():
    rows = [Row("a", "float", None, 800, ()), Row("b", "compiled", None, 400, ()), Row("c", "quantized", None, 100, ())]
    for row in rows:
        row.evaluate = lambda: None
    found = table(rows, {"a": 100.0, "b": 50.0, "c": 20.0}, batch_size=4)
    assert [row["per_second"] for row in found] == [40, 80, 200] and [row["file_ratio"] for row in found] == [1, 2, 8]
    assert [row["to_float32"] for row in found] == [1, 2, 5] and [row["to_compiled"] for row in found] == [0.5, 1, 2.5]


def test_weights_in_memory(tiny, calibrated):
    """A shared tensor counts once; the simulation holds codes beside the float weights."""
    layer = nn.Linear(3, 5)
    assert weight_bytes(nn.Sequential(layer, layer)) == 4 * 20
    network = load_checkpoint(calibrated.folder / "ckpt.safetensors").network
    assert 1.2 < weight_bytes(network) / float_bytes(network) < 1.5


def test_the_plan(tiny, tmp_path):
    plan = yaml.safe_load(passed(call("benchmark", *SHORT, *tiny.model, "--dry_run")).out)
    assert plan["rows"] == "float32 half float32-compiled half-compiled simulate onnx auto" and tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ((), ("-r, --config",)),
        (("config",), ("no float weights", "--use_pretrained")),
        (("model", "--runtimes", "fast"), ("--runtimes", "'fast'", "half-compiled")),
        (("model", "--cali_ckpt", "nope.safetensors"), ("nope.safetensors", "no such")),
        (("model", "--cali_ckpt", "x.safetensors", "--weight_bit", 4), ("--weight_bit", "x.safetensors")),
        (("model", "--weight_bit", 9), ("--weight_bit", "'9'")),
        (("model", "--half", "float64"), ("--half", "float64")),
        (("model", "--attention", "none"), ("--attention", "none")),
        (("latent", "--cali_ckpt", "packed"), ("ddim", "ldm")),
    ],
    ids=str,
)
def test_mistakes(tiny, latent, calibrated, tmp_path, flags, names):
    stand_for = {"model": tiny.model, "config": tiny.model[:2], "latent": ("-r", latent.ldm.ckpt)}
    stand_for["packed"] = (calibrated.folder / "ckpt.safetensors",)
    given = [part for flag in flags for part in stand_for.get(flag, (flag,))]
    refused(call("benchmark", *SHORT, *given), *names)
    assert tree(tmp_path) == {}
