"""Every comparison, calibration and measurement writes report.html; report.py writes it anew from the folder."""

import html
import json
import re
import shutil

import pytest
import torch
from comparing import in_this_process
from running import call, passed, refused, tree

from qdiff.checkpoints.native import load_checkpoint
from qdiff.cli.quantize import write_report
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.utils.devices import device_name

pytestmark = pytest.mark.usefixtures("real_reports")
CPU = torch.device("cpu")
SHORT = ("--timesteps", 4, "--cali_st", 2, "--cali_n", 2, "--n_samples", 4)
METHODS = ("--methods", "nearest", "quick:3", "--a_sym", "--split")


@pytest.fixture(scope="module")
def compared(tiny32, tmp_path_factory):
    """The output folder of a comparison."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        passed(call("compare_methods", *tiny32.model, *SHORT, *METHODS, "--outdir", folder))
    return folder


def text_of(folder):
    """The report's text, without its markup."""
    page = (folder / "report.html").read_text(encoding="utf8")
    assert len(page) < 5_000_000 and "http:" not in page and "https:" not in page
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2])).split())


def sections(folder):
    page = (folder / "report.html").read_text(encoding="utf8")
    return re.findall(r"<h2 [^>]*>([^<]*)</h2>", page)


def rewritten(folder, tmp_path):
    """The report that report.py makes of a copy of the folder."""
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("report.html"))
    result = passed(call("report", copy))
    assert result.out == f"{copy / 'report.html'}\n" and result.bars == []
    return (copy / "report.html").read_text(encoding="utf8")


def test_a_comparison(compared, tmp_path):
    text, page = text_of(compared), (compared / "report.html").read_text(encoding="utf8")
    assert sections(compared) == [
        *("Command and environment", "Results", "Images", "Error growth", "Learning", "Layers", "Recipes")
    ]
    command = f"python {(compared / 'run.log').read_text().partition('command: ')[2].splitlines()[0]}"
    assert command in text and device_name(CPU) in text
    rows = [
        json.loads((compared / slug / "result.json").read_text())["row"] for slug in ("nearest_w4a8", "quick-3_w4a8")
    ]
    best = max(rows, key=lambda row: row["psnr_db"])
    assert f"{best['label']} W4A8 comes closest to the float model's images: {best['psnr_db']:.1f} dB" in text
    assert all(f"{row['psnr_db']:.2f}" in text for row in rows)
    assert page.count("<img ") == 1 + 2 * 2 and page.count('type="range"') == 2
    assert page.count('class="line c0 d0"') == 3 and page.count('class="line c1 d0"') == 3  # two charts and a legend
    assert page.count('class="spark"') == len(
        (compared / "quick-3_w4a8" / "calibration.jsonl").read_text().splitlines()
    )
    assert rewritten(compared, tmp_path) == page


@pytest.mark.long
def test_a_comparison_with_a_measurement_beside_it(compared, tiny32, tmp_path):
    flags = ("--timesteps", 3, "--cali_st", 2, "--cali_n", 2, "--n_samples", 1, "--bits", 3, 4, "--outdir", "out")
    passed(call("sensitivity", *tiny32.model, *flags))
    assert sections(tmp_path / "out") == ["Command and environment", "Sensitivity", "Chosen bits"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf8")
    assert "W4A8, by timestep" in page and rewritten(tmp_path / "out", tmp_path) == page
    copy = shutil.copytree(compared, tmp_path / "compared")
    shutil.copy(tmp_path / "out" / "sensitivity.json", copy)
    passed(call("report", copy))
    assert sections(copy)[-2:] == ["Sensitivity", "Recipes"]


def test_a_comparison_that_is_not_finished(compared, tmp_path):
    """What is done is shown; without the float model's images there is nothing to show."""
    copy = shutil.copytree(compared, tmp_path / "copy")
    (copy / "quick-3_w4a8" / "result.json").unlink()
    passed(call("report", copy))
    assert "nearest W4A8 beside the float model" in text_of(copy) and "quick" not in "".join(sections(copy))
    (copy / "nearest_w4a8" / "result.json").unlink()
    passed(call("report", copy))
    assert sections(copy) == ["Command and environment", "Results"]
    (copy / "float" / "result.json").unlink()
    refused(call("report", copy), copy / "float" / "result.json")


def test_a_calibration(calibrated, tmp_path):
    text, page = text_of(calibrated.folder), (calibrated.folder / "report.html").read_text(encoding="utf8")
    assert sections(calibrated.folder) == ["Command and environment", "Learning", "Layers", "Recipe"]
    assert "sample_diffusion_ddim.py --config" in text and f"device {device_name(CPU)}" in text and "seed 1234" in text
    network = load_checkpoint(calibrated.folder / "ckpt.safetensors").network
    assert all(name in text for name in quant_layers(network)) and len(act_quantizers(network)) > 20
    units = (calibrated.folder / "calibration.jsonl").read_text().splitlines()
    assert f"{len(units)} units have learned" in text
    assert rewritten(calibrated.folder, tmp_path) == page


def test_a_calibration_without_logs(calibrated, tmp_path):
    shutil.copy(calibrated.folder / "ckpt.safetensors", tmp_path)
    write_report(tmp_path)
    assert sections(tmp_path) == ["Command and environment", "Layers", "Recipe"]


def test_bad_input(tmp_path, calibrated):
    refused(call("report", tmp_path / "none"), f"{tmp_path / 'none'}: no such folder")
    refused(
        call("report", tmp_path), f"{tmp_path}: expected one of comparison.yaml, ckpt.safetensors, sensitivity.json"
    )
    (tmp_path / "ckpt.safetensors").write_bytes((calibrated.folder / "ckpt.safetensors").read_bytes()[:5000])
    refused(call("report", tmp_path), "ckpt.safetensors: not a readable checkpoint")
    (tmp_path / "ckpt.safetensors").unlink()
    (tmp_path / "comparison.yaml").write_text("runs: [")
    refused(call("report", tmp_path), "comparison.yaml: not what a script has written")
    (tmp_path / "comparison.yaml").unlink()
    (tmp_path / "sensitivity.json").write_text("{}")
    refused(call("report", tmp_path), "sensitivity.json, or a file beside it: not what a script has written")
    assert tree(tmp_path).keys() == {"sensitivity.json"} and not (tmp_path / "report.html").exists()
