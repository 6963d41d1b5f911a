"""What a calibration shows and logs: a bar on the terminal, JSON lines for machines, a plot of losses at the end."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qdiff.api.progress import BarProgress
from qdiff.calibration.context import UnitReport
from qdiff.utils.atomic import atomic

LOG_NAME, PLOT_NAME = "calibration.jsonl", "calibration_loss.png"


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at most in use so far: of the process, mapped files included, and of the device's tensors."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return found


@dataclass
class _Pace:
    """How fast the units of the running stage learn, to tell when it ends."""

    stage: int
    seconds: float = 0.0
    units: int = 0


class CalibrationLog(BarProgress):
    """The bar, and a line per learned unit in a file: what it is, how its loss and error went, pace, peak memory.

    `remaining_seconds` is for the running stage, from the mean time of the units that learned in this process. With
    `tensorboard` the same numbers, and every loss, go to the folder's tensorboard/ too.
    """

    def __init__(self, folder: Path, device: torch.device, tensorboard: bool = False) -> None:
        """Raises ValueError where TensorBoard is asked for and not installed."""
        super().__init__()
        self.path, self.device = folder / LOG_NAME, device
        self._pace: _Pace | None = None
        self._events = event_logger(folder) if tensorboard else None

    def unit(self, report: UnitReport, done: int, total: int, restored: bool = False) -> None:
        if restored:  # its line was written before the interruption
            return
        if self._pace is None or self._pace.stage != report.stage:
            self._pace = _Pace(report.stage)
        self._pace.seconds += report.seconds
        self._pace.units += 1
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "stage": report.stage,
            "unit": report.unit,
            "units_done": done,
            "units": total,
            "seconds": round(report.seconds, 3),
            "iterations": report.iterations,
            "iterations_per_second": round(report.iterations / report.seconds, 2),
            "loss": report.losses[-1][1] if report.losses else None,
            "losses": [(step, float(f"{loss:.4g}")) for step, loss in report.losses],
            "error_before": report.before,
            "error_after": report.after,
            "kept": report.kept,
            "remaining_seconds": round((total - done) * self._pace.seconds / self._pace.units, 1),
            "peak_memory_bytes": peak_memory(self.device),
        }
        with self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps(line) + "\n")
        if self._events is not None:
            self._log_events(report, done)

    def _log_events(self, report: UnitReport, done: int) -> None:
        """A curve of losses for each unit, and one of errors over the units, by the number of units done."""
        for step, loss in report.losses:
            self._events.log_metrics({f"loss_of_stage_{report.stage}/{report.unit}": loss}, step)
        found = {"error_before": report.before, "error_after": report.after, "seconds": report.seconds}
        self._events.log_metrics({f"stage_{report.stage}/{name}": value for name, value in found.items()}, done)
        self._events.save()


def check_tensorboard() -> None:
    """Raise ValueError where --tensorboard is asked for and nothing can write its files."""
    if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise ValueError("--tensorboard: needs TensorBoard, found none: pip install '.[tensorboard]'")


def event_logger(folder: Path):
    """Lightning's logger for TensorBoard, into the folder's tensorboard/. Raises what `check_tensorboard` raises."""
    check_tensorboard()
    from qdiff.utils.fabric_team import without_torchmetrics

    with without_torchmetrics():
        from lightning_fabric.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="tensorboard", version="")


def plot_losses(reports: list[UnitReport], path: Path) -> None:
    """A PNG of what was learned: each unit's loss over its iterations, relative to its first, and its error before
    and after. Nothing is written where nothing was learned."""
    if not reports:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = sorted({report.stage for report in reports})
    height = 4 * len(stages)
    figure = Figure(figsize=(11, height))
    FigureCanvasAgg(figure)
    # Fixed margins, in inches above and below: a computed layout draws everything twice, on short runs for longer than
    # it takes to learn.
    margins = {"left": 0.075, "right": 0.985, "bottom": 0.55 / height, "top": 1 - 0.35 / height}
    grid = {**margins, "wspace": 0.24, "hspace": 0.3}
    axes = figure.subplots(len(stages), 2, squeeze=False, gridspec_kw=grid)
    for row, stage in zip(axes, stages, strict=True):
        mine = [report for report in reports if report.stage == stage]
        _loss_curves(row[0], mine)
        _errors(row[1], mine)
        row[0].set_title(f"stage {stage}: loss of each unit, relative to its first")
        row[1].set_title(f"stage {stage}: error of each unit's output")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _loss_curves(axis, reports: list[UnitReport]) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for i, report in enumerate(reports):
        points = [(step, loss / report.losses[0][1]) for step, loss in report.losses if report.losses[0][1] > 0]
        points = [(step, ratio) for step, ratio in points if ratio > 0 and math.isfinite(ratio)]
        if points:
            axis.plot(*zip(*points, strict=True), color=colours(i / max(1, len(reports) - 1)), linewidth=0.8)
    axis.set_yscale("log")
    axis.set_xlabel("iteration (dark: first units, light: last)")


def _errors(axis, reports: list[UnitReport]) -> None:
    for label, values, marker in (
        ("before", [report.before for report in reports], "o"),
        ("after", [report.after for report in reports], "x"),
    ):
        axis.plot(range(len(values)), values, marker, label=label, markersize=4)
    axis.set_yscale("log")
    axis.set_xlabel("unit, in the order of learning")
    axis.set_ylabel("mean squared error")
    axis.legend()
