"""benchmark.py calibrate: what it measures, on tiny networks; the plain loop that it measures against."""

import json

import pytest
import torch
import yaml
from running import call, passed, refused, tree

from ddim.pretrained import build_network, load_config
from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.context import RunOptions
from qdiff.calibration.frontier import BaselineFrontier
from qdiff.calibration.selectors import CalibrationSet
from qdiff.cli.benchmark.plain_calibration import baseline_optimise
from qdiff.families import adapter_for
from qdiff.methods import MethodOptions, make_recipe
from qdiff.nn.layers import quant_layers

CALIBRATE = ("benchmark", "calibrate")
SHORT = ("--cali_st", 2, "--cali_n", 3, "--iters", 3, "--batch_size", 2)
UNITS = ["down.0.block.0", "up.0.block.0"]  # in execution order


def measured(tmp_path, *flags):
    """The numbers of a run: its JSON file, and its standard output."""
    result = passed(call(*CALIBRATE, *SHORT, *flags, "--json", "new/out.json"))
    assert list(tree(tmp_path)) == ["new", "new/out.json"]
    return json.loads((tmp_path / "new" / "out.json").read_text()), result.out


def test_a_pixel_model(tiny, tmp_path):
    found, out = measured(tmp_path, *tiny.model, "--units", *UNITS[::-1])
    assert [row["unit"] for row in found["units"]] == UNITS
    for row in found["units"]:
        assert all(row[f"{key}_rate"] * row[f"{key}_ms"] == pytest.approx(1000) for key in "wa")
        assert row["start"] > 0 and "w_plain_ms" not in row
        assert f"| {row['unit']}" in out
    total = sum(20000 * row["w_ms"] + 5000 * row["a_ms"] for row in found["units"])
    assert found["minutes_of_published_iterations_of_these_units"] == pytest.approx(total / 60000)
    what = [row["what"] for row in found["work"]]
    assert what == [
        *("weight ranges, minmax", "weight ranges, shrink", "activation ranges, minmax, 6 states"),
        *("capture, float", "capture, quantized"),
    ]
    assert all(row["seconds"] > 0 for row in found["work"]) and found["peak_bytes"]["host"] > 2**26
    units = len(build_network(load_config(tiny.config)).chain())  # all of them hold layers
    assert [row["runs"] for row in found["work"][-2:]] == [units, units - 1]  # one batch; the last output is no input
    assert "plain" not in out


@pytest.mark.parametrize("name", ["ldm", "cin", "sd"])
@pytest.mark.cases("sd")
def test_latent_models(latent, tmp_path, name):
    config = getattr(latent, name).config
    flags = ("--config", config, "--random", "--units", "middle_block.0", "--ranges", "minmax")
    found, out = measured(tmp_path, *flags)
    assert [row["unit"] for row in found["units"]] == ["middle_block.0"]
    assert [row["what"].partition(",")[0] for row in found["work"][:2]] == ["weight ranges", "activation ranges"]
    assert found["batch_size"] == 2 and found["work"][1]["what"].startswith("activation ranges, shrink")
    assert f"config {config}" in out


@pytest.mark.long
def test_a_latent_checkpoint(latent, tmp_path):
    found, _ = measured(tmp_path, "-r", latent.sd.folder, "--units", "middle_block.0", "--ranges", "minmax")
    assert found["units"][0]["w_ms"] > 0


def test_against_plain(tiny, tmp_path):
    flags = ("--units", "conv_in", "--ranges", "--against", "plain", "--method", "q-diffusion", "--cali_iters", 2)
    found, out = measured(tmp_path, *tiny.model, *flags, "--cali_n", 9)
    (unit,) = found["units"]
    assert unit["w_ratio"] == unit["w_plain_ms"] / unit["w_ms"] and unit["a_ratio"] == unit["a_plain_ms"] / unit["a_ms"]
    rows = {row["what"]: row for row in found["work"]}
    units, batches = len(build_network(load_config(tiny.config)).chain()), 2
    prefixes = batches * units * (units - 1) // 2
    capture, whole = rows["capture"], rows["whole calibration, q-diffusion"]
    assert capture["runs"] == batches * (2 * units - 1)  # the float units also give targets
    assert capture["plain_runs"] == 2 * prefixes + batches * units
    assert capture["runs_ratio"] == capture["plain_runs"] / capture["runs"]
    assert whole["plain_runs"] > 3 * whole["runs"] and whole["seconds_ratio"] > 0
    assert found["agreement"]["equal_codes"] > 0.99 and found["agreement"]["largest_error_difference"] < 0.05
    assert "plain runs / runs" in out and "agreement" in out


@pytest.mark.parametrize("method", ["quick", "q-diffusion"])
@pytest.mark.long
def test_the_plain_loop_comes_to_the_same_result(tiny, method):
    """In float64, where rounding cannot tip a code."""
    config = load_config(tiny.config)
    config.model |= {"ch_mult": [1], "attn_resolutions": [16]}
    network, generator = build_network(config).double(), torch.Generator().manual_seed(0)
    x, t = torch.randn(6, 3, 16, 16, generator=generator).double(), torch.tensor([10, 400, 900] * 2)
    ranges = {"weight_range": "minmax", "act_range": "minmax"}
    options = MethodOptions(4, 8, True, split=True, batch_size=4, iterations=6, act_iterations=4, **ranges)
    recipe, data = make_recipe(method, options), CalibrationSet(x, t, torch.zeros(6))
    plain = RunOptions(frontier=BaselineFrontier, optimise=baseline_optimise)
    runs = [calibrate(network, adapter_for("ddim"), recipe, data, 1, options=o) for o in (RunOptions(), plain)]
    ours, theirs = (quant_layers(run.network) for run in runs)
    for name, layer in ours.items():
        assert torch.equal(layer.codes, theirs[name].codes), name
        for a, b in zip(layer.act_quantizers, theirs[name].act_quantizers, strict=True):
            torch.testing.assert_close(a.scale, b.scale, rtol=1e-9, atol=0)
    for a, b in zip(*(run.reports for run in runs), strict=True):
        assert (a.unit, a.kept) == (b.unit, b.kept) and a.after == pytest.approx(b.after, rel=1e-9)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ((), ("-r, --config",)),
        (("--config", "nope.yml", "--random"), ("nope.yml",)),
        (("model", "--units", "conv_in", "nope"), ("--units nope", "conv_in, ")),
        (("config",), ("no float weights", "--use_pretrained")),
        (("latent",), ("no float weights", "--random")),
        (("model", "--iters", 0), ("--iters", "'0'")),
        (("model", "--products", "float16"), ("--products",)),
        (("model", "--against", "nothing"), ("--against", "plain")),
        (("model", "--device", "nonsense"), ("--device nonsense",)),
        (("model", "--method", "quick"), ("--method", "--against plain")),
        (("-r", "nowhere"), ("nowhere",)),
    ],
    ids=lambda value: "_".join(map(str, value)) if str(value[:1]).startswith(("('model", "('--", "('-r")) else "",
)
def test_bad_input(tiny, latent, tmp_path, flags, names):
    stand_ins = {"model": tiny.model, "config": tiny.model[:2], "latent": ("--config", latent.ldm.config)}
    flags = [part for flag in flags for part in stand_ins.get(flag, (flag,))]
    refused(call(*CALIBRATE, *flags), *names)
    assert tree(tmp_path) == {}


def test_dry_run(tiny, tmp_path):
    plan = yaml.safe_load(passed(call(*CALIBRATE, *SHORT, *tiny.model, "--dry_run")).out)
    assert plan["states"] == 6 and tree(tmp_path) == {}
