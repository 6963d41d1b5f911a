"""The report of a comparison as one HTML file, from what lies in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from qdiff.cli.compare.plan import FLOAT, PLAN_NAME, RESULT_NAME
from qdiff.cli.compare.table import MIB, table_of
from qdiff.cli.progress import LOG_NAME
from qdiff.evaluation.report import (
    REPORT_NAME,
    Chart,
    Charts,
    Folded,
    Heading,
    Report,
    Section,
    Table,
    Text,
    render,
    write,
)
from qdiff.evaluation.report_charts import Line, line_chart, looks
from qdiff.evaluation.report_images import make_gallery
from qdiff.evaluation.report_layers import layer_charts, layer_rows, layer_table
from qdiff.evaluation.report_runs import (
    RunLog,
    command_section,
    duration,
    read_units,
    recipe_block,
    sampler_of,
    short,
    unit_blocks,
    unit_summary,
)
from qdiff.evaluation.report_sensitivity import sensitivity_section
from qdiff.utils.files import parse_yaml, read_json

IMAGES_NAME, SENSITIVITY_NAME, RUN_LOG = "images.safetensors", "sensitivity.json", "run.log"
IMAGES = 16  # of each entry, at most
MOST_BYTES = 4_600_000  # of a page: fewer and smaller images where there are many entries
RESULTS_NOTE = (
    "PSNR to float: of the images from the same noise, over all pixels. FD: Fréchet distance of features, to the float "
    "model's images and to the training images. RMS error at the end: of x (of latents, where there are some) after "
    "the last sampler step. In bold: the closest to the float model."
)


@dataclass(frozen=True)
class Done:
    """A finished entry of a comparison: its name, its row of the results, its recipe."""

    slug: str
    row: dict[str, Any]
    recipe: dict[str, Any]

    @property
    def label(self) -> str:
        """The method and its bits, as "quick W4A8"."""
        row = self.row
        acts = "" if row["act_bits"] == 32 else f"A{row['act_bits']}"
        return f"{row['label']} W{row['weight_bits']}{acts}" + " per channel" * row.get("per_channel", False)

    @property
    def caption(self) -> str:
        """How close its images are, and its size."""
        return f"{closeness(self.row)}, {self.row['bytes'] / MIB:.1f} MiB"


def closeness(row: dict[str, Any]) -> str:
    """PSNR to the float model's images; no number means that they are the same."""
    return "the float model's very images" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"


def write_page(folder: Path, slugs: Sequence[str] | None = None) -> None:
    """Write report.html of the finished entries `slugs` (default: of all) into a comparison's folder.

    Raises FileNotFoundError where the float model's results are not there.
    """
    write(comparison_page(folder, slugs), folder / REPORT_NAME)


def comparison_page(folder: Path, slugs: Sequence[str] | None = None) -> Report:
    """The report of a comparison's folder; arguments and errors as of `write_page`."""
    try:
        plan = parse_yaml((folder / PLAN_NAME).read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{folder / PLAN_NAME}: not what a script has written: {error}") from error
    found = read_json(folder / FLOAT / RESULT_NAME)
    done = []
    for slug in plan["runs"] if slugs is None else slugs:
        path = folder / slug / RESULT_NAME
        if path.is_file():
            row = read_json(path)["row"]
            done.append(Done(slug, row, plan["runs"][slug]))
    log = RunLog.read(folder / RUN_LOG)
    best = max(done, key=lambda entry: _psnr(entry.row), default=None)
    first = [_command(folder, plan, found, log), _results(found["row"], done, best)]
    rest = [
        *_errors(plan["family"], done),
        *_learning(folder, done),
        *_layers(folder, done),
        *_sensitivity(folder),
    ]
    if done:
        rest.append(Section("Recipes", [recipe_block(entry.recipe, entry.label) for entry in done]))
    when = "" if log is None else f", {log.started[:10]}"
    about = f"{plan['family'].capitalize()} model; {sampler_of(plan['sampling'])}; {plan['n_samples']} images{when}"
    page = Report(_title(done), _headline(found["row"], done, best), about, [*first, *rest])
    left = MOST_BYTES - len(render(page)) if done else 0
    return replace(page, sections=[*first, *_images(folder, done, left), *rest])


def _psnr(row: dict[str, Any]) -> float:
    return float("inf") if row["psnr_db"] is None else row["psnr_db"]


def _title(done: Sequence[Done]) -> str:
    if len(done) == 1:
        return f"{done[0].label} beside the float model"
    return f"{len(done)} quantized models beside the float one"


def _headline(reference: dict[str, Any], done: Sequence[Done], best: Done | None) -> str:
    if best is None:
        return "Nothing is quantized yet."
    smaller = f"{best.row['bytes'] / MIB:.1f} MiB, {reference['bytes'] / best.row['bytes']:.1f} times smaller"
    if best.row["psnr_db"] is None:
        return f"{best.label} makes the float model's very images with {smaller}."
    closest = " comes closest to the float model's images" if len(done) > 1 else ""
    return f"{best.label}{closest}: {best.row['psnr_db']:.1f} dB PSNR with {smaller}."


def _command(folder: Path, plan: dict[str, Any], found: dict[str, Any], log: RunLog | None) -> Section:
    results = [folder / slug / RESULT_NAME for slug in (FLOAT, *plan["runs"])]
    seconds = sum(read_json(path)["seconds"] for path in results if path.is_file())
    facts = [
        ("model family", plan["family"]),
        ("SHA-256 of the weights", short(plan["source_sha256"])),
        ("sampler", sampler_of(plan["sampling"])),
        ("images", f"{plan['n_samples']}, in batches of {plan['batch_size']}"),
        ("seed", plan["seed"]),
        ("device", found["device"]),
        ("time of all parts", duration(seconds)),
    ]
    return command_section(log, facts)


def _results(reference: dict[str, Any], done: Sequence[Done], best: Done | None) -> Section:
    rows, columns = table_of([reference, *(entry.row for entry in done)])
    stressed = None if best is None or len(done) < 2 else 1 + done.index(best)
    return Section("Results", [Table("Measurements", columns, rows, RESULTS_NOTE, best=stressed)])


def _images(folder: Path, done: Sequence[Done], left: int) -> list[Section]:
    """left: bytes that images may take."""
    if not done:
        return []
    reference = read_images(folder / FLOAT / IMAGES_NAME)
    entries = [(entry.label, entry.caption, read_images(folder / entry.slug / IMAGES_NAME)) for entry in done]
    text = "From the same noise. To the left of the line the float model's images, to the right the quantized one's."
    return [Section("Images", [Text(text), make_gallery(reference, entries, left)])]


def read_images(path: Path) -> Tensor:
    """The first images of a file, [N, C, H, W] in [0, 1]."""
    with safe_open(path, "pt") as file:
        return file.get_slice("images")[:IMAGES]


def _errors(family: str, done: Sequence[Done]) -> list[Section]:
    """How errors grow over the sampler's steps, where that is known."""
    known = [entry for entry in done if entry.row.get("accumulated")]
    if not known:
        return []
    of = "x" if family == "pixel" else "latents"
    classes, charts = looks([entry.row["label"] for entry in known]), []
    for title, values in (
        ("Error of each step alone, from the float model's state", [entry.row["single_step"] for entry in known]),
        # without the first state, which is the same noise for all
        ("Accumulated error after each step", [entry.row["accumulated"][1:] for entry in known]),
    ):
        lines = [Line(e.label, v or (), look) for e, v, look in zip(known, values, classes, strict=True)]
        charts.append(Chart(title, line_chart(lines, title, "sampler step (the noisiest is 1)", f"RMS error of {of}")))
    legend = [(look, entry.label) for entry, look in zip(known, classes, strict=True)]
    return [Section("Error growth", [Charts(charts, legend), Folded("All values", [_error_table(known)])])]


def _error_table(known: Sequence[Done]) -> Table:
    columns, steps = [("step", "step", "d")], len(known[0].row["accumulated"]) - 1
    rows: list[dict[str, Any]] = [{"step": step} for step in range(1, steps + 1)]
    for entry in known:
        for name, values in (("step alone", entry.row["single_step"]), ("accumulated", entry.row["accumulated"][1:])):
            if values:
                columns.append((f"{entry.slug} {name}", f"{entry.label}, {name}", "#.3g"))
                for row, value in zip(rows, values, strict=True):
                    row[f"{entry.slug} {name}"] = value
    return Table("RMS errors by step", columns, rows)


def _learning(folder: Path, done: Sequence[Done]) -> list[Section]:
    blocks: list[Any] = []
    for entry in done:
        units = read_units(folder / entry.slug / LOG_NAME)
        if units:
            blocks += [Heading(entry.label), Text(unit_summary(units)), *unit_blocks(units, f"Units of {entry.label}")]
    return [Section("Learning", blocks)] if blocks else []


def _layers(folder: Path, done: Sequence[Done]) -> list[Section]:
    blocks: list[Any] = []
    for entry in done:
        path = folder / f"{entry.slug}.safetensors"
        if path.is_file():
            rows = rows_of_layers(path)
            table = layer_table(f"Layers of {entry.label}", rows)
            blocks += [Heading(entry.label), layer_charts(rows), Folded(f"All {len(rows)} grids", [table])]
    return [Section("Layers", blocks)] if blocks else []


def rows_of_layers(path: Path) -> list[dict[str, Any]]:
    """The rows of a checkpoint's layers; a comparison, which writes its report after every entry, reads them once."""
    return _remembered(path.resolve(), path.stat().st_mtime_ns)


@cache
def _remembered(path: Path, changed: int) -> list[dict[str, Any]]:
    return layer_rows(path)


def _sensitivity(folder: Path) -> list[Section]:
    path = folder / SENSITIVITY_NAME
    return [sensitivity_section(read_json(path))] if path.is_file() else []
