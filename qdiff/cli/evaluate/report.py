"""What evaluate.py shows and writes: the table, what is left out, warnings, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdiff.cli.evaluate.metrics import Score
from qdiff.evaluation.table import markdown_table
from qdiff.utils.files import write_text

COLUMNS = [
    ("images", "images", "s"),
    ("label", "metric", "s"),
    ("value", "value", ".6g"),
    ("interval", "± (95 %)", "s"),
    ("against", "against", "s"),
    ("note", "note", "s"),
]
FIELDS = ("images", "count", "metric", "label", "value", "low", "high", "half_width", "against", "note")


def rows_of(name: str, count: int, scores: list[Score]) -> list[dict[str, Any]]:
    """A row per score, as JSON and CSV hold it."""
    rows = []
    for score in scores:
        row = {"images": name, "count": count, **asdict(score), "low": None, "high": None}
        if score.value is not None and score.half_width is not None:
            row |= {"low": score.value - score.half_width, "high": score.value + score.half_width}
        rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    shown = [
        {
            **row,
            "images": f"{row['images']} ({row['count']})",
            "value": row["value"],
            "interval": None if row["half_width"] is None else f"{row['half_width']:.2g}",
        }
        for row in rows
    ]
    return markdown_table(shown, [column for column in COLUMNS if any(row.get(column[0]) is not None for row in shown)])


def left_out_lines(left_out: dict[str, dict[str, str]]) -> list[str]:
    """A line per reason: the metrics that it keeps from being computed. left_out: images -> metric -> reason."""
    metrics: dict[str, dict[str, None]] = {}
    for reasons in left_out.values():
        for metric, reason in reasons.items():
            metrics.setdefault(reason, {})[metric] = None
    return [f"left out: {', '.join(names)}: {reason}" for reason, names in metrics.items()]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, lines: list[list[Any]]) -> None:
    """A CSV file; None is an empty cell."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(path, text.getvalue())


def csv_lines(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """A line of names, and one per row."""
    return [list(FIELDS), *([row[field] for field in FIELDS] for row in rows)]
