"""A heat map with names on both axes, on a logarithmic scale of colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdiff.utils.atomic import atomic

DPI, ROW_INCHES, COLUMN_INCHES = 100, 0.2, 0.32


@dataclass(frozen=True, eq=False)
class Panel:
    """values: [rows, columns], shown where positive; others stay blank."""

    title: str
    values: np.ndarray
    columns: Sequence[str]


def heat_map(panels: Sequence[Panel], rows: Sequence[str], title: str, path: Path | str) -> None:
    """Write a PNG of panels side by side, which share their rows and their logarithmic scale of colours.

    The file appears whole or not at all. Raises ValueError where names and values do not fit, or nothing is positive.
    """
    for panel in panels:
        if panel.values.shape != (len(rows), len(panel.columns)):
            found = list(panel.values.shape)
            raise ValueError(f"heat map: expected values [{len(rows)}, {len(panel.columns)}], found {found}")
    shown = [np.where(np.isfinite(p.values) & (p.values > 0), p.values, np.nan) for p in panels]
    finite = np.concatenate([values[np.isfinite(values)] for values in shown])
    if not finite.size:
        raise ValueError("heat map: expected some positive value, found none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    widths = [len(panel.columns) for panel in panels]
    size = (3.5 + COLUMN_INCHES * sum(widths), 1.8 + ROW_INCHES * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0]
    norm = LogNorm(finite.min(), finite.max())
    for axis, panel, values in zip(axes, panels, shown, strict=True):
        image = axis.imshow(values, aspect="auto", norm=norm, cmap="viridis", interpolation="nearest")
        axis.set_xticks(range(len(panel.columns)), panel.columns, fontsize=8, rotation=90)
        axis.set_title(panel.title, fontsize=9)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    figure.supxlabel("timestep, the noisiest first", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.colorbar(image, ax=list(axes), shrink=0.8, pad=0.02)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
