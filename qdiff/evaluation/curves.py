"""A picture of errors along the sampler's steps: what each step adds, and what has added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qdiff.utils.atomic import atomic

INCHES, DPI = (11.0, 5.0), 100  # 1100 pixels wide
STYLES = ("-", "--", ":", "-.")
COLUMNS = 4  # of the legend


@dataclass(frozen=True)
class Curve:
    """Errors of one entry: [S] root mean squares after each sampler step, None where they are not known.

    Curves of one `group` have one colour; their lines differ.
    """

    label: str
    group: str
    single_step: Sequence[float] | None
    accumulated: Sequence[float] | None


def error_curves(curves: Sequence[Curve], path: Path | str, of: str = "x") -> None:
    """Write a PNG of two panels over the sampler's steps, with logarithmic errors: of single steps, and accumulated.

    of: what the errors are of, as the axis calls it. Values that a logarithm cannot show (0, undefined) leave gaps.
    The file appears whole or not at all. Raises ValueError where there are no curves, or their lengths differ.
    """
    _check(curves)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(curves) // COLUMNS)
    figure = Figure(figsize=(INCHES[0], INCHES[1] + 0.25 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axis, name, title in (
        (left, "single_step", "error of each step alone, from the float model's state"),
        (right, "accumulated", "accumulated error after each step"),
    ):
        _panel(axis, curves, name)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("sampler step (the noisiest is 1)")
    left.set_ylabel(f"RMS error of {of}")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(COLUMNS, len(curves)), fontsize=10)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _panel(axis, curves: Sequence[Curve], name: str) -> None:
    """One line for each curve; a line without values still has its place in the legend."""
    shown = False
    for curve, (colour, style) in zip(curves, _looks(curves), strict=True):
        values = [value if value > 0 else float("nan") for value in getattr(curve, name) or ()]
        shown = shown or any(value == value for value in values)
        steps = range(1, len(values) + 1)
        marker = "o" if len(values) < 3 else None
        axis.plot(steps, values, style, color=colour, label=curve.label, linewidth=1.6, marker=marker, markersize=4)
    axis.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.locator_params(axis="x", integer=True)
    if shown:
        axis.set_yscale("log")
    else:
        axis.text(0.5, 0.5, "not known for this sampler", transform=axis.transAxes, ha="center", color="#5f6368")


def _looks(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """(colour, line style) of each curve: colours by group, styles within it."""
    from matplotlib import colormaps

    colours, used, looks = colormaps["tab10"].colors, {}, []
    for curve in curves:
        group = used.setdefault(curve.group, [len(used), 0])
        looks.append((colours[group[0] % len(colours)], STYLES[(group[1] + group[0] // len(colours)) % len(STYLES)]))
        group[1] += 1
    return looks


def _check(curves: Sequence[Curve]) -> None:
    if not curves:
        raise ValueError("curves: expected at least one, found none")
    lengths = {len(errors) for curve in curves for errors in (curve.single_step, curve.accumulated) if errors}
    if len(lengths) > 1:
        raise ValueError(f"curves: expected one length, found {', '.join(map(str, sorted(lengths)))}")
