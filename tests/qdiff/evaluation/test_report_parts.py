"""What a report is made of: charts to scale, images pixel by pixel, layers and logs as they were written."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from qdiff.checkpoints.native import save_checkpoint
from qdiff.evaluation.report import render
from qdiff.evaluation.report_charts import Bar, Line, heat_map, line_chart, looks, spans, sparkline
from qdiff.evaluation.report_images import GAP, make_gallery
from qdiff.evaluation.report_layers import layer_charts, layer_rows, layer_table
from qdiff.evaluation.report_runs import (
    RunLog,
    calibration_report,
    duration,
    read_units,
    sampler_of,
    unit_blocks,
    unit_summary,
)
from qdiff.evaluation.report_sensitivity import sensitivity_report, sensitivity_section
from qdiff.nn.layers import QuantAttention, act_quantizers, quant_layers
from qdiff.recipes.recipe import QuantSpec, Recipe, Rule, StepGroups
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

W4A8 = Recipe(
    "w4a8 split",
    *(QuantSpec(4, axis="out_channel"), QuantSpec(8, "signed"), QuantSpec(8, "unsigned")),
    split_shortcuts=True,
    stages=(WeightRanges(RangeSpec()), ActivationRanges()),
)


def points(markup):
    """Coordinates of the paths of lines."""
    found = re.findall(r'<path class="line[^>]* d="([^"]*)"', markup)
    return [[tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)] for path in found]


def test_equal_ratios_are_equal_heights():
    first, second = points(line_chart([Line("a", [1, 10, 100]), Line("b", [10, 10, 0.1])], "t", "x", "y"))
    rise = first[0][1] - first[1][1]
    assert rise > 20 and first[1][1] - first[2][1] == pytest.approx(rise, abs=0.2)
    assert second[0] == (first[0][0], first[1][1]) and second[2][1] - second[0][1] == pytest.approx(2 * rise, abs=0.3)
    assert first[1][0] - first[0][0] == pytest.approx(first[2][0] - first[1][0], abs=0.2)


def test_what_a_logarithm_cannot_show_leaves_gaps():
    chart = line_chart([Line("a", [1, 0, 2, 3, None, float("nan"), 4])], "t", "x", "y")
    (path,) = re.findall(r' d="(M[^"H]*)"', chart)
    assert [part.count("L") for part in path.split("M")[1:]] == [0, 1, 0]
    assert chart.count("<circle") == 2  # a point between gaps is a dot
    assert "not known" in line_chart([Line("a", [0, None])], "t", "x", "y")


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([1, 1000], ["1", "10", "100", "1000"]),
        ([2e-6, 3e-4], ["10⁻⁵", "10⁻⁴", "3·10⁻⁶", "3·10⁻⁵"]),
        ([0.02, 0.09], ["0.02", "0.05"]),
        ([5, 5], ["5"]),
    ],
)
def test_ticks_are_round_numbers(values, ticks):
    chart = line_chart([Line("a", values)], "t", "x", "y")
    found = re.findall(r'text-anchor="end">([^<]*)<', chart)
    assert set(ticks) <= set(found) and 1 <= len(found) <= 9


def test_spans_are_to_scale():
    chart = spans([Bar("a", -1, 1), Bar("b", 0, 1, "quiet"), Bar("c", 0.5, 0.5)], "t", "x", "y")
    heights = [float(h) for h in re.findall(r'class="bar[^>]* height="([\d.]+)"', chart)]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2) and heights[2] == 0
    assert 'class="bar quiet"' in chart and "none" in spans([], "t", "x", "y")


def test_a_heat_map_has_a_cell_for_every_positive_value():
    chart = heat_map(["a", "b"], ["1", "2", "3"], [[0.1, 1, 10], [0, 1, None]], "t", "x", [0, 1])
    places = [int(p) for p in re.findall(r'--p:(\d+)%"[^>]*><title>', chart)]
    assert places == [0, 50, 100, 50] and chart.count('class="chosen"') == 2
    assert "none" in heat_map(["a"], ["1"], [[0]], "t", "x")


def test_colours_by_group_and_dashes_within():
    assert looks(["a", "b", "a"]) == ["c0 d0", "c1 d0", "c0 d1"]
    many = looks([str(i) for i in range(20)])
    assert len(set(many)) == 20


def test_sparklines():
    assert sparkline([1.0], "t") == "" and sparkline([0, 0], "t") == ""
    assert 'd="M1.0 1.0L36.0 9.0L71.0 17.0"' in sparkline([100, 10, 1], "t")


def pixels(address):
    """uint8 [H, W, 4] of a PNG's address."""
    kind, content = address.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_a_gallery_shows_the_images_and_how_far_they_are_apart():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(20, 3, 6, 4, generator=generator)
    near = (reference + 0.1 * torch.randn(reference.shape, generator=generator)).clamp(0, 1)
    gallery = make_gallery(reference, [("near", "c", near), ("same", "", reference)])
    assert (gallery.count, gallery.columns, gallery.pixelated, gallery.factor) == (16, 8, True, 4)
    sheet, found = pixels(gallery.reference.images), pixels(gallery.pairs[0].images)
    apart = pixels(gallery.pairs[0].difference)
    assert sheet.shape == (gallery.height, gallery.width, 4) == (2 * 6 + GAP, 8 * 4 + 7 * GAP, 4)
    for i in range(16):
        top, left = i // 8 * (6 + GAP), i % 8 * (4 + GAP)
        expected, other = ((x[i].permute(1, 2, 0) * 255).round().int().numpy() for x in (reference, near))
        for shown, wanted in ((sheet, expected), (found, other), (apart, np.minimum(4 * abs(other - expected), 255))):
            assert (shown[top : top + 6, left : left + 4, :3] == wanted).all()
            assert (shown[top : top + 6, left : left + 4, 3] == 255).all()
    assert (sheet[:, 4 : 4 + GAP, 3] == 0).all()  # gaps are transparent
    assert pixels(gallery.pairs[1].difference)[..., :3].max() == 0


def test_a_gallery_keeps_to_its_budget():
    """Fewer and smaller images, the same for all, rather than a larger file."""
    reference = torch.rand(16, 1, 200, 100, generator=torch.Generator().manual_seed(0))
    full = make_gallery(reference, [("a", "", reference)])
    small = make_gallery(reference, [("a", "", reference)], budget=200_000)
    assert (full.count, full.columns, full.pixelated, full.height) == (16, 4, False, 4 * 160 + 3 * GAP)
    assert (small.count, small.height) == (8, 2 * 64 + GAP)
    assert len(small.reference.images + small.pairs[0].images + small.pairs[0].difference) <= 200_000
    assert make_gallery(reference, [("a", "", reference)], budget=1).count == 4


def test_a_gallery_of_undefined_pixels_and_of_wrong_shapes():
    reference = torch.rand(2, 3, 4, 4)
    gallery = make_gallery(reference, [("nan", "", torch.full_like(reference, torch.nan))])
    assert pixels(gallery.pairs[0].images)[..., :3].max() == 0 and gallery.factor == 1
    with pytest.raises(ValueError, match=r"a: expected images \[2, 3, 4, 4\], found \[1, 3, 4, 4\]"):
        make_gallery(reference, [("a", "", reference[:1])])
    with pytest.raises(ValueError, match=r"reference: expected images \[N, 1 or 3, H, W\]"):
        make_gallery(reference[:, :2], [])


@pytest.fixture
def saved(quantized, adapter, timesteps, tmp_path):
    """(recipe) -> (network, path of its checkpoint)."""

    def save(recipe):
        network, path = quantized(recipe), tmp_path / "ckpt.safetensors"
        about = {"seed": 7, "source": "w.safetensors", "source_sha256": "ab" * 32}
        save_checkpoint(path, network, adapter, recipe, timesteps, about)
        return network, path

    return save


RULES = (Rule("conv_*", 8, 8), Rule("mid.*", 2), Rule("temb.*", 0, 0), Rule("*.temb_proj", 5, 0))


@pytest.mark.parametrize(
    "recipe",
    [
        W4A8,
        replace(W4A8, name="mixed", rules=RULES, step_groups=StepGroups(3, "hold")),
        replace(W4A8, name="per channel", activations=QuantSpec(4, axis="in_channel"), softmax=None),
        replace(W4A8, name="weights", activations=None, softmax=None, stages=W4A8.stages[:1]),
    ],
    ids=lambda recipe: recipe.name,
)
def test_layers_are_those_of_the_network(saved, recipe):
    """Every range is found in the network by other means: weights in the folded ones, inputs by what a grid returns."""
    network, path = saved(recipe)
    rows = {row["layer"]: row for row in layer_rows(path)}
    parts = 0
    for name, layer in quant_layers(network).items():
        for i, part in enumerate(layer.slices):
            label = name if len(layer.slices) == 1 else f"{name} (channels {part.start} to {part.stop - 1})"
            row, parts = rows[label], parts + 1
            if layer.weight_quantizers:
                weight, codes, spec = layer.weight[:, part], layer.codes[:, part], layer.weight_quantizers[i].spec
                assert row["weight_low"] == pytest.approx(weight.min().item(), rel=1e-6)
                assert row["weight_high"] == pytest.approx(weight.max().item(), rel=1e-6)
                ends = sum((codes == end).sum().item() for end in (spec.qmin, spec.qmax)) / codes.numel()
                assert row["at_ends"] == pytest.approx(100 * ends) and row["weight_bits"] == spec.bits
            else:
                assert "weight_bits" not in row
            if layer.act_quantizers:
                same_grid(row, layer.act_quantizers[i])
            else:
                assert "act_bits" not in row
    attentions = [m for m in network.modules() if isinstance(m, QuantAttention)]
    assert len(rows) == parts + 4 * len(attentions)
    assert sum("act_bits" in row for row in rows.values()) == len(act_quantizers(network))


def same_grid(row, quantizer):
    """Compare a row with what the grid makes of very small and very large inputs."""
    wide = torch.tensor([-1e9, 1e9])
    ends = [
        (torch.clamp((x / s).round() + z, quantizer.spec.qmin, quantizer.spec.qmax) - z) * s
        for x in wide
        for s, z in zip(quantizer.scale.flatten(), quantizer.zero_point.flatten(), strict=True)
    ]
    assert row["act_low"] == pytest.approx(min(ends).item()) and row["act_high"] == pytest.approx(max(ends).item())
    assert (row["act_bits"], row["sets"]) == (quantizer.spec.bits, len(quantizer.scale))


def test_columns_and_charts_of_what_there_is(saved):
    recipe = replace(W4A8, name="weights", activations=None, softmax=None, stages=W4A8.stages[:1])
    rows = layer_rows(saved(recipe)[1])
    table, charts = layer_table("t", rows), layer_charts(rows).charts
    assert [key for key, _, _ in table.columns] == ["layer", "weight_bits", "weight_low", "weight_high", "at_ends"]
    assert [chart.title for chart in charts] == ["Ranges of the weights"]
    rows = layer_rows(saved(W4A8)[1])
    assert {"scale", "zero point"} < {name for _, name, _ in layer_table("t", rows).columns}  # one set for all steps
    rows[3] |= {"scale_high": 9.0}
    assert {"scale min", "scale max", "zero point"} < {name for _, name, _ in layer_table("t", rows).columns}
    assert len(layer_charts(rows).charts) == 2


LOG = """2026-11-21 15:17:33,077 INFO command: scripts/x.py --first
2026-11-21 15:17:33,077 INFO torch 2.0.0, 1 threads
2026-11-21 16:17:33,077 INFO command: scripts/x.py --second <b>
2026-11-21 16:17:33,077 INFO torch 2.1.0+cpu, 2 threads
2026-11-21 16:17:34,077 INFO device: cpu, 2 threads
"""


def test_a_run_log(tmp_path):
    path = tmp_path / "run.log"
    assert RunLog.read(path) is None
    path.write_text("nothing of interest\n")
    assert RunLog.read(path) is None
    path.write_text(LOG)
    expected = ("2026-11-21 15:17:33", "scripts/x.py --second <b>", 2, "2.1.0+cpu", "2", "cpu, 2 threads")
    assert RunLog.read(path) == RunLog(*expected)


def unit(name, before, after, kept=True, **more):
    return {"stage": 3, "unit": name, "error_before": before, "error_after": after, "kept": kept, **more}


def test_units_are_the_last_lines_of_each(tmp_path):
    """A killed process leaves half a line, and a unit that was learned again two."""
    path = tmp_path / "calibration.jsonl"
    assert read_units(path) == []
    lines = [unit("a", 2.0, 1.0, seconds=3), unit("b", 1.0, 1.5, False, seconds=1), unit("a", 2.0, 0.5, seconds=2)]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": 3, "un')
    units = read_units(path)
    assert [(u["unit"], u["change"], u["outcome"]) for u in units] == [("a", -75.0, "kept"), ("b", 50.0, "put back")]
    expected = "2 units have learned in 3 s; 1 of them were kept; the median unit's error changed by −75.0 %."
    assert unit_summary(units) == expected


def test_losses_are_averaged_and_shown_relative_to_the_first():
    """Two units of 40 points: twenty windows of two; three of equal length have a median."""
    scattering = [[i, 2.0 if i % 2 else 6.0] for i in range(40)]
    units = [
        unit(name, 2.0, 1.0, change=-50.0, outcome="kept", seconds=1, iterations=40, losses=losses)
        for name, losses in (("a", scattering), ("b", [[i, 1.0] for i in range(40)]), ("c", [[0, 4.0], [39, 2.0]]))
    ]
    (charts, folded) = unit_blocks(units, "Units")
    first, second, third = points(charts.charts[0].svg)
    assert len(first) == 20 and first == second and len({y for _, y in first}) == 1
    assert len(third) == 2 and third[1][1] > third[0][1] == first[0][1] and "median" not in charts.charts[0].svg
    assert [bool(drawing) for drawing in folded.blocks[0].drawings] == [True] * 3
    with_median = unit_blocks([*units[:2], units[1] | {"unit": "d"}], "Units")[0].charts[0]
    assert "<title>median</title>" in with_median.svg and "median" in with_median.title
    without = unit_blocks([each | {"losses": []} for each in units], "Units")
    assert len(without[0].charts) == 1 and without[1].blocks[0].drawings == ()


def test_the_report_of_a_calibration(saved, tmp_path):
    path, log, run = saved(W4A8)[1], tmp_path / "calibration.jsonl", tmp_path / "run.log"
    bare = render(calibration_report(path, log, run))
    assert "w4a8 split W4A8" in bare and "Learning" not in bare and "abababababab…" in bare and "finder: minmax" in bare
    run.write_text(LOG)
    more = {"seconds": 1.0, "iterations": 4}
    units = [unit("conv_in", 2.0, 1.0, **more, losses=[[0, 4.0], [3, 1.0]]), unit("mid", 1.0, 1.5, False, **more)]
    log.write_text("".join(json.dumps(each) + "\n" for each in units))
    full = render(calibration_report(path, log, run))
    for text in ("Learning", "put back", "--second", "&lt;b&gt;", "2026-11-21", "conv_in: loss over its iterations"):
        assert text in full
    assert full.count('class="spark"') == 1 and full == render(calibration_report(path, log, run))


def test_sensitivity(tmp_path):
    row = {"stored_bytes": 10, "products": 100}
    rows = [
        {"unit": name, "bits": bits, **row, "rms_at_the_end": end / bits, "rms_at_t_800": end, "rms_at_t_0.5": 0.0}
        for name, end in (("conv_in", 3.0), ("mid", 1.0))
        for bits in (2, 4)
    ]
    found = {
        "config": "c.yml",
        "act_bits": 8,
        "timesteps": [800.0, 0.5],
        "chosen": {"conv_in": 4, "mid": 2},
        "rows": rows,
    }
    at_the_end, by_step = sensitivity_section(found).blocks[1].charts
    assert at_the_end.svg.count('class="chosen"') == 2 and "conv_in, 4: 0.75" in at_the_end.svg
    assert (
        "W2A8" in by_step.title and "W4A8" in sensitivity_section(found | {"weight_bit": 4}).blocks[1].charts[1].title
    )
    assert by_step.svg.count("<title>") == 1 + 2  # what is not positive stays blank
    report = sensitivity_report(found, tmp_path / "run.log")
    assert "2 to 4 bits for 2 units" in report.headline and "conv_in (4 bits)" in report.headline and render(report)


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (120, "2.0 min"), (7200, "2.0 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_samplers():
    found = {"sampler": "ddim", "steps": 50, "eta": 0.0, "seed": 3, "timesteps": [1]}
    assert sampler_of(found) == "ddim, 50 steps, eta 0.0" and sampler_of({}) is None
