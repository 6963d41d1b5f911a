"""The table of a comparison: its columns, and its rows made ready for them."""

from __future__ import annotations

from typing import Any

from qdiff.evaluation.table import FD_NAME

MIB = 2**20
COLUMNS = [
    ("label", "method", "s"),
    ("bits", "W/A", "s"),
    ("psnr_db", "PSNR to float (dB)", ".2f"),
    ("fd_float", "FD to float", ".2f"),
    ("fd", FD_NAME, ".2f"),
    ("prompt_accuracy", "prompt's class named", ".3f"),
    ("end_error", "RMS error at the end", ".3g"),
    ("mib", "size (MiB)", ".2f"),
    ("calibration_minutes", "calibration (min)", ".2f"),
    ("sampling_seconds", "sampling (s)", ".1f"),
    ("host_mib", "peak memory (MiB)", ".0f"),
    ("device_mib", "peak GPU memory (MiB)", ".0f"),
]
Columns = list[tuple[str, str, str]]


def table_of(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Columns]:
    """The rows in the units of the table, and the columns that have something to say."""
    shown = [
        {
            **row,
            "bits": bits_of(row),
            "end_error": row["accumulated"][-1] if row.get("accumulated") else None,
            "mib": row["bytes"] / MIB,
            "calibration_minutes": row["calibration_seconds"] / 60 if "calibration_seconds" in row else None,
            **{f"{kind}_mib": size / MIB for kind, size in row["peak_memory_bytes"].items()},
        }
        for row in rows
    ]
    return shown, [column for column in COLUMNS if any(row.get(column[0]) is not None for row in shown)]


def bits_of(row: dict[str, Any]) -> str:
    """Weight and activation bits, as "4/8" or "4/4 (per channel)"."""
    return f"{row['weight_bits']}/{row['act_bits']}" + " (per channel)" * row.get("per_channel", False)
