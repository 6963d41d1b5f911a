"""The HTML report: one file that holds everything it shows, for a screen of any width and for paper.

A report is data: sections of tables, charts, galleries and texts; `report.html.jinja` is how they look. Nothing is
loaded from elsewhere, and a policy in the file forbids it. Without JavaScript everything is there to read; with it,
images get a slider. Tables carry themselves as CSV, with all digits, in the link that downloads them.
"""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qdiff.evaluation.table import MISSING
from qdiff.utils.files import write_text

REPORT_NAME = "report.html"
TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Table:
    """A caption, columns (key, header, format) as `table.markdown_table` takes them, and rows of plain data.

    drawings: an SVG for each row, in a last column headed `drawn`, which the CSV leaves out. best: the row to stress.
    """

    title: str
    columns: Sequence[tuple[str, str, str]]
    rows: Sequence[dict[str, Any]]
    note: str = ""
    drawings: Sequence[Markup] = ()
    drawn: str = ""
    best: int | None = None
    kind = "table"

    @property
    def cells(self) -> list[list[str]]:
        """What each row shows."""
        return [[shown(row.get(key), spec) for key, _, spec in self.columns] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [not any(isinstance(row.get(key), str) for row in self.rows) for key, _, _ in self.columns]

    @property
    def csv(self) -> str:
        """The table as comma-separated values, numbers with all their digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\r\n")
        writer.writerow([header for _, header, _ in self.columns])
        writer.writerows([[row.get(key) for key, _, _ in self.columns] for row in self.rows])
        return text.getvalue()

    @property
    def csv_uri(self) -> str:
        """The CSV as a link's address."""
        return data_uri("text/csv;charset=utf-8", self.csv.encode())

    @property
    def file_name(self) -> str:
        """What the CSV is called when it is downloaded."""
        return f"{slug(self.title)}.csv"


@dataclass(frozen=True)
class Chart:
    """An SVG and the caption above it."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Charts:
    """Charts side by side, with one legend: (classes of the line, label)."""

    charts: Sequence[Chart]
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    kind = "charts"


@dataclass(frozen=True)
class Pair:
    """One entry's images, and how far they are from the reference, as addresses of PNGs."""

    label: str
    caption: str
    images: str
    difference: str


@dataclass(frozen=True)
class Gallery:
    """Images of entries beside those of a reference, each in one PNG of the same layout.

    width, height: of the PNGs in pixels; pixelated: whether pixels are to stay visible; factor: of the differences.
    """

    count: int
    columns: int
    width: int
    height: int
    pixelated: bool
    factor: int
    reference: Pair
    pairs: Sequence[Pair]
    kind = "gallery"


@dataclass(frozen=True)
class Facts:
    """Terms and what they are, where that is known."""

    pairs: Sequence[tuple[str, str]]
    kind = "facts"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind = "text"


@dataclass(frozen=True)
class Code:
    """Text as it stands, in a fixed width."""

    text: str
    kind = "code"


@dataclass(frozen=True)
class Command:
    """A command line, broken between its words only."""

    text: str
    kind = "command"


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str
    kind = "heading"


@dataclass(frozen=True)
class Folded:
    """Blocks behind a title that unfolds them."""

    title: str
    blocks: Sequence[Any]
    kind = "folded"


@dataclass(frozen=True)
class Section:
    """A heading of the page and its blocks."""

    title: str
    blocks: Sequence[Any]

    @property
    def anchor(self) -> str:
        """What links to it name."""
        return slug(self.title)


@dataclass(frozen=True)
class Report:
    """A page: its title, what it says in one sentence, what it is about, and its sections."""

    title: str
    headline: str
    about: str
    sections: Sequence[Section]


def render(report: Report) -> str:
    """The page."""
    given: dict[int, str] = {}

    def ident(prefix: str, block: Any) -> str:
        """The id of an element, the same whenever a block is named."""
        return given.setdefault(id(block), f"{prefix}{len(given) + 1}")

    return _environment().get_template(TEMPLATE).render(report=report, ident=ident)


def write(report: Report, path: Path | str) -> None:
    """Write the page; the file appears whole or not at all."""
    write_text(path, render(report))


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def shown(value: Any, spec: str) -> str:
    """A table's value for people; what is not known or not finite is a dash."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return MISSING
    return format(value, spec).replace("-", "−") if not isinstance(value, str) else format(value, spec)


def data_uri(kind: str, content: bytes) -> str:
    """An address that holds its content."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def slug(text: str) -> str:
    """A name for files and anchors: "Error growth, W4" is error-growth-w4."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
