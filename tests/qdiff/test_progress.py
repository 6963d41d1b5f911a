"""What a calibration logs: JSON lines, and the same for TensorBoard."""

import importlib.util
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qdiff.calibration.run import UnitReport
from qdiff.progress import CalibrationLog, check_tensorboard

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
