"""What a calibration logs: JSON lines, the same for TensorBoard, and a plot of losses."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qdiff.calibration.context import UnitReport
from qdiff.cli.progress import CalibrationLog, check_tensorboard, plot_losses

REPORTS = [
    UnitReport(1, "conv_in", 0.5, 0.25, True, 2.0, 10, ((0, 2.0), (9, 1.0))),
    UnitReport(1, "mid.block_1", 0.75, 0.5, True, 3.0, 10, ((0, 4.0), (9, 3.0))),
]


def curves(folder):
    """{name: [(step, value)]} of the folder's TensorBoard files"""
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_line_and_curves_for_each_unit(tmp_path, tensorboard):
    log = CalibrationLog(tmp_path, torch.device("cpu"), tensorboard)
    for done, report in enumerate(REPORTS, 1):
        log.unit(report, done, 2)
    log.unit(REPORTS[0], 2, 2, restored=True)  # of before an interruption
    lines = [json.loads(line) for line in (tmp_path / "calibration.jsonl").read_text().splitlines()]
    assert [(line["unit"], line["units_done"], line["remaining_seconds"]) for line in lines] == [
        ("conv_in", 1, 2.0),
        ("mid.block_1", 2, 0.0),
    ]
    assert (tmp_path / "tensorboard").is_dir() == tensorboard
    if tensorboard:
        found = curves(tmp_path)
        assert found["loss_of_stage_1/conv_in"] == [(0, 2.0), (9, 1.0)]
        assert found["stage_1/error_after"] == [(1, 0.25), (2, 0.5)]
        assert found["stage_1/error_before"] == [(1, 0.5), (2, 0.75)]


def test_tensorboard_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard: needs TensorBoard, found none: pip install"):
        check_tensorboard()


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_plot_has_a_row_for_each_stage_and_keeps_all_text_inside(tmp_path, stages):
    """Losses that a logarithm cannot show are left out."""
    losses = ((0, 2.0), (1, 0.0), (2, float("nan")), (5, float("inf")), (9, 1.6))
    first = replace(REPORTS[0], stage=0)
    units = [replace(report, stage=stage) for stage in range(stages) for report in REPORTS]
    plot_losses([*units, replace(first, losses=losses), replace(first, losses=())], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape == (440 * stages, 1210)
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edges == 255).all() and (pixels < 128).any(axis=1).reshape(stages, 440).any(axis=1).all()
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_nothing_learned_is_not_plotted(tmp_path):
    plot_losses([], tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
