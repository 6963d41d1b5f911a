"""What a calibration leaves in its folder, as parts of a report: its command, its units, its layers, its recipe."""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import qdiff
from qdiff.checkpoints.native import read_about
from qdiff.evaluation.report import Chart, Charts, Code, Command, Facts, Folded, Report, Section, Table, Text
from qdiff.evaluation.report_charts import Bar, Line, line_chart, spans, sparkline
from qdiff.evaluation.report_layers import layer_charts, layer_rows, layer_table
from qdiff.utils.files import parse_json

MIB = 2**20
WINDOWS = 20  # over which a unit's losses are averaged
UNIT_COLUMNS = [
    ("unit", "unit", "s"),
    ("stage", "stage", "d"),
    ("error_before", "error before", "#.3g"),
    ("error_after", "error after", "#.3g"),
    ("change", "change (%)", "+.1f"),
    ("outcome", "outcome", "s"),
    ("iterations", "iterations", "d"),
    ("seconds", "time (s)", ".1f"),
]
UNIT_NOTE = (
    "Errors are mean squared errors of the unit's output before and after it has learned; what does not lower its "
    "error is put back where the recipe says so. The line is the loss over the iterations, averaged over windows of "
    "them, on a logarithmic scale of its own."
)
_START = re.compile(r"^(\S+ \d\d:\d\d:\d\d)\S* INFO command: (.*)$")
_TORCH = re.compile(r" INFO torch (\S+), (\d+) threads$")
_DEVICE = re.compile(r" INFO device: (.*)$")


@dataclass(frozen=True)
class RunLog:
    """What a run.log says about the runs that wrote it: the first start, the last command, versions, the device."""

    started: str
    command: str
    starts: int
    torch: str
    threads: str
    device: str

    @classmethod
    def read(cls, path: Path) -> RunLog | None:
        """None where there is no such file, or it names no command."""
        if not path.is_file():
            return None
        lines = path.read_text(encoding="utf8", errors="replace").splitlines()
        starts = [found for found in map(_START.search, lines) if found]
        if not starts:
            return None
        torch = [found for found in map(_TORCH.search, lines) if found]
        device = [found[1] for found in map(_DEVICE.search, lines) if found]
        version, threads = torch[-1].groups() if torch else ("", "")
        return cls(starts[0][1], starts[-1][2], len(starts), version, threads, device[-1] if device else "")


def command_section(log: RunLog | None, facts: Sequence[tuple[str, Any]]) -> Section:
    """The command line, the environment, and further facts; those that are None or empty are left out."""
    about: list[tuple[str, Any]] = list(facts)
    if log is not None:
        about += [("device", log.device), ("started", log.started)]
        about += [("starts", log.starts if log.starts > 1 else None), ("torch", log.torch), ("threads", log.threads)]
    about += [("toolkit", f"qdiff {qdiff.__version__}"), ("Python", platform.python_version())]
    known: dict[str, str] = {}
    for term, value in about:
        if value not in (None, "") and term not in known:
            known[term] = str(value)
    command = [] if log is None else [Command(f"python {log.command}")]
    return Section("Command and environment", [*command, Facts(list(known.items()))])


def read_units(path: Path) -> list[dict[str, Any]]:
    """The units in a calibration's log, the last line of each; [] where there is no log.

    A line that a killed process has left unfinished is passed over.
    """
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf8").splitlines() if path.is_file() else ():
        try:
            unit = parse_json(line)
        except ValueError:
            continue
        before, after = unit["error_before"], unit["error_after"]
        more = {
            "change": 100 * (after / before - 1) if before else None,
            "outcome": "kept" if unit["kept"] else "put back",
        }
        found[unit["stage"], unit["unit"]] = unit | more
    return list(found.values())


def unit_blocks(units: Sequence[dict[str, Any]], title: str) -> list[Any]:
    """Charts of losses and errors, and the table."""
    losses = [_averaged(unit.get("losses") or []) for unit in units]
    charts = [_loss_chart(units, losses)] if any(losses) else []
    changes = "Change of each unit's error (grey: put back)"
    bars = [_bar(unit) for unit in units if unit["change"] is not None]
    charts.append(Chart(changes, spans(bars, changes, "unit, in the order of learning", "change (%)")))
    pairs = zip(units, losses, strict=True)
    drawings = [
        sparkline([y for _, y in points], f"{unit['unit']}: loss over its iterations") for unit, points in pairs
    ]
    drawings = drawings if any(losses) else ()
    table = Table(title, UNIT_COLUMNS, units, UNIT_NOTE, drawings, "loss" if drawings else "")
    return [Charts(charts), Folded(f"All {len(units)} units", [table])]


def _averaged(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """(iteration, loss), both averaged over windows, since the losses of single batches scatter."""
    count = min(WINDOWS, len(points))
    edges = [len(points) * i // count for i in range(count + 1)] if count else []
    windows = [points[first:last] for first, last in zip(edges, edges[1:], strict=False)]
    return [(statistics.fmean(x for x, _ in each), statistics.fmean(y for _, y in each)) for each in windows]


def _loss_chart(units: Sequence[dict[str, Any]], losses: Sequence[list[tuple[float, float]]]) -> Chart:
    """A line for each unit, relative to its first loss, and their median where all have learned for as long."""
    known = [(u["unit"], points) for u, points in zip(units, losses, strict=True) if len(points) > 1 and points[0][1]]
    curves = [
        Line(name, [y / points[0][1] for _, y in points], at=[x for x, _ in points], place=i / max(1, len(known) - 1))
        for i, (name, points) in enumerate(known)
    ]
    title = "Loss of each unit (from light to dark: first to last)"
    if len(known) > 2 and len({tuple(curve.at) for curve in curves}) == 1:
        middle = [statistics.median(column) for column in zip(*(curve.values for curve in curves), strict=True)]
        curves.append(Line("median", middle, "c1 d0 strong", at=curves[0].at))
        title = "Loss of each unit (light to dark: first to last) and median"
    svg = line_chart(curves, "Loss of each unit over its iterations", "iteration", "loss, relative to the first")
    return Chart(title, svg)


def _bar(unit: dict[str, Any]) -> Bar:
    change, tip = unit["change"], f"{unit['unit']}: {unit['error_before']:.3g} to {unit['error_after']:.3g}"
    return Bar(f"{tip}, {unit['outcome']}", min(change, 0.0), max(change, 0.0), "c0" if unit["kept"] else "quiet")


def unit_summary(units: Sequence[dict[str, Any]]) -> str:
    """How learning went, in one sentence."""
    kept, seconds = sum(unit["kept"] for unit in units), sum(unit["seconds"] for unit in units)
    changes = [unit["change"] for unit in units if unit["kept"] and unit["change"] is not None]
    middle = f"; the median unit's error changed by {statistics.median(changes):+.1f} %" if changes else ""
    text = f"{len(units)} units have learned in {duration(seconds)}; {kept} of them were kept{middle}."
    return text.replace("-", "−")


def layer_blocks(checkpoint: Path, title: str) -> list[Any]:
    """Charts and the table of a checkpoint's layers."""
    rows = layer_rows(checkpoint)
    return [layer_charts(rows), Folded(f"All {len(rows)} grids", [layer_table(title, rows)])]


def recipe_block(recipe: dict[str, Any], name: str) -> Folded:
    """A recipe as it can be given back."""
    text = yaml.safe_dump(recipe, sort_keys=False, width=100, allow_unicode=True)
    return Folded(f"Recipe: {name}", [Code(text.rstrip())])


def bits_of(recipe: dict[str, Any]) -> str:
    """W4A8 and the like."""
    acts = recipe["activations"]
    return f"W{recipe['weights']['bits']}" + ("" if acts is None else f"A{acts['bits']}")


def calibration_report(checkpoint: Path, units_log: Path, run_log: Path) -> Report:
    """The report of one calibration from what it has written; the logs may be missing.

    Raises what reading the checkpoint raises: FileNotFoundError, or ValueError naming it.
    """
    about, log, units = read_about(checkpoint), RunLog.read(run_log), read_units(units_log)
    recipe, sampling = about["recipe"], about.get("sampling") or {}
    name, size = f"{recipe['name']} {bits_of(recipe)}", checkpoint.stat().st_size / MIB
    facts = [
        ("method", name),
        ("model family", about["family"]),
        ("weights", about.get("source")),
        ("SHA-256 of the weights", short(about.get("source_sha256"))),
        ("sampler", sampler_of(sampling)),
        ("seed", about.get("seed")),
        ("size", f"{size:.2f} MiB"),
    ]
    sections = [command_section(log, facts)]
    if units:
        sections.append(Section("Learning", [Text(unit_summary(units)), *unit_blocks(units, "Units")]))
    sections.append(Section("Layers", layer_blocks(checkpoint, "Layers")))
    sections.append(Section("Recipe", [recipe_block(recipe, name)]))
    headline = f"{name}: {size:.1f} MiB. {unit_summary(units) if units else 'Nothing was learned by gradients.'}"
    when = "" if log is None else f", {log.started[:10]}"
    return Report(f"Calibration: {name}", headline, f"{about['family']} model{when}", sections)


def sampler_of(sampling: dict[str, Any]) -> str | None:
    """A sampler's description in a few words."""
    if not sampling:
        return None
    more = [f"{key} {sampling[key]}" for key in ("skip_type", "eta", "scale") if sampling.get(key) is not None]
    return ", ".join([str(sampling.get("sampler")), f"{sampling.get('steps')} steps", *more])


def short(digest: str | None) -> str | None:
    """The beginning of a digest."""
    return None if digest is None else f"{digest[:12]}…"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
