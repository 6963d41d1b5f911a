"""What a comparison shows: the table, the JSON file, a picture of images, a picture of errors."""

from __future__ import annotations

import json
from typing import Any

from comparison_parts import IMAGES_NAME
from comparison_plan import FLOAT, Comparison
from comparison_sampling import read_tensor
from torch import Tensor

from qdiff.evaluation.curves import Curve, error_curves
from qdiff.evaluation.fidelity import METRIC
from qdiff.evaluation.picture import comparison_picture
from qdiff.evaluation.table import markdown_table
from qdiff.files import write_text

MIB = 2**20
PICTURED = 8  # images of each row of the picture
COLUMNS = [
    ("label", "method", "s"),
    ("bits", "W/A", "s"),
    ("psnr_db", "PSNR to float (dB)", ".2f"),
    ("fd_float", "FD to float", ".2f"),
    ("fd", METRIC, ".2f"),
    ("prompt_accuracy", "prompt's class named", ".3f"),
    ("end_error", "RMS error at the end", ".3g"),
    ("mib", "size (MiB)", ".2f"),
    ("calibration_minutes", "calibration (min)", ".2f"),
    ("sampling_seconds", "sampling (s)", ".1f"),
    ("host_mib", "peak memory (MiB)", ".0f"),
    ("device_mib", "peak GPU memory (MiB)", ".0f"),
]


def write_report(comparison: Comparison) -> str:
    """Write results.json, results.md, comparison.png and errors.png of what is done; return the table."""
    folder, results = comparison.folder, {}
    for slug in (FLOAT, *(entry.slug for entry in comparison.entries)):
        if (found := comparison.result(slug)) is not None:
            results[slug] = found
    rows = [result["row"] for result in results.values()]
    table = make_table(rows)
    content = {
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "rows": rows,
        "timesteps": comparison.model.pipeline.timesteps().tolist(),
    }
    write_text(folder / "results.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "results.md", table + "\n")
    _picture(comparison, results)
    curves = [_curve(row) for row in rows if row.get("accumulated")]
    if curves:
        error_curves(curves, folder / "errors.png", "x" if comparison.model.family == "pixel" else "latents")
    return table


def make_table(rows: list[dict[str, Any]]) -> str:
    """The table of the rows, with the columns that have something to say."""
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
    known = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in shown)]
    return markdown_table(shown, known)


def bits_of(row: dict[str, Any]) -> str:
    """Weight and activation bits, as "4/8" or "4/4 (per channel)"."""
    return f"{row['weight_bits']}/{row['act_bits']}" + " (per channel)" * row.get("per_channel", False)


def _curve(row: dict[str, Any]) -> Curve:
    """A row's errors, without the first state, which is the same noise for all."""
    label = f"{row['label']} {bits_of(row)}"
    return Curve(label, row["label"], row["single_step"], row["accumulated"][1:])


def _picture(comparison: Comparison, results: dict[str, dict[str, Any]]) -> None:
    rows, captions = [], []
    for slug, result in results.items():
        row = result["row"]
        rows.append((row["label"], _in_colour(read_tensor(comparison.part(slug) / IMAGES_NAME, "images", PICTURED))))
        psnr = "" if row["psnr_db"] is None else f", {row['psnr_db']:.1f} dB"
        per_channel = "\nper channel" * row.get("per_channel", False)
        captions.append(f"W{row['weight_bits']}A{row['act_bits']}{psnr}{per_channel}\n{row['bytes'] / MIB:.1f} MiB")
    scale = 3 if rows[0][1].shape[-1] <= 64 else 1
    comparison_picture(rows, comparison.folder / "comparison.png", columns=PICTURED, scale=scale, captions=captions)


def _in_colour(images: Tensor) -> Tensor:
    """[N, C, H, W] as three channels."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
