"""benchmark.py: ratios and their JSON file."""

import json
import re

import pytest
import torch
import yaml
from running import call, passed, refused, tree

BENCHMARK = ("--batch_size", 2, "--repeats", 2)


def test_benchmark(tiny, tmp_path):
    flags = ("simulate", *tiny.model, *BENCHMARK, "--json", "new/out.json")
    result = passed(call("benchmark", *flags))
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


def test_benchmark_of_rollouts(tiny, tmp_path):
    """Memory by group size: flat for the two passes and the reverse sweep, growing for the unrolled graph."""
    flags = ("--batch_size", 1, "--group_sizes", 1, 4, "--json", tmp_path / "out.json")
    passed(call("benchmark", "rollout", *tiny.model, *flags))
    rows = json.loads((tmp_path / "out.json").read_text())["rollouts"]
    ratios = {row["gradient"]: row["ratio"] for row in rows if row["steps"] == 4}
    assert ratios["two_pass"] < 1.1 and ratios["exact"] < 1.1 and ratios["unrolled"] > 2.5
    assert all(row["ratio"] == 1 for row in rows if row["steps"] == 1)


@pytest.mark.parametrize("flags", [("--group_sizes", 0), ("--gradients", "none"), ("--batch_size", 0)])
def test_benchmark_of_rollouts_with_bad_input(tiny, flags):
    refused(call("benchmark", "rollout", *tiny.model, *flags), flags[0])
