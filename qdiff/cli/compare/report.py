"""What a comparison shows: the table, the JSON file, a picture of images, a picture of errors, the report."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from qdiff.cli.compare.page import write_page
from qdiff.cli.compare.parts import IMAGES_NAME
from qdiff.cli.compare.plan import FLOAT, Comparison
from qdiff.cli.compare.sampling import read_tensor
from qdiff.cli.compare.table import MIB, bits_of, table_of
from qdiff.evaluation.curves import Curve, error_curves
from qdiff.evaluation.picture import comparison_picture
from qdiff.evaluation.table import markdown_table
from qdiff.utils.files import write_text

PICTURED = 8  # images of each row of the picture


def write_report(comparison: Comparison) -> str:
    """Write results.json, results.md, comparison.png, errors.png and report.html of what is done; return the table."""
    folder, results = comparison.folder, {}
    for slug in (FLOAT, *(entry.slug for entry in comparison.entries)):
        if (found := comparison.result(slug)) is not None:
            results[slug] = found
    rows = [result["row"] for result in results.values()]
    table = markdown_table(*table_of(rows))
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
    write_page(folder, [slug for slug in results if slug != FLOAT])
    return table


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
