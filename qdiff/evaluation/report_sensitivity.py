"""The section of a report that shows what quantizing each unit alone costs, and the bits that were chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdiff.evaluation.report import Chart, Charts, Folded, Report, Section, Table, Text
from qdiff.evaluation.report_charts import heat_map
from qdiff.evaluation.report_runs import RunLog, command_section

PREFIX = "rms_at_t_"
COLUMNS = [
    ("unit", "unit", "s"),
    ("bits", "bits", "d"),
    ("stored_bytes", "stored (bytes)", "d"),
    ("products", "products", "d"),
    ("rms_at_the_end", "RMS at the end", "#.3g"),
]
NOTE = (
    "Each unit alone is quantized, everything else stays float. Errors are root mean squares, on a logarithmic scale "
    "of colours; at the end: what the unit adds to the result of sampling, to first order."
)


def sensitivity_section(found: dict[str, Any]) -> Section:
    """found: the content of sensitivity.json."""
    rows, chosen = found["rows"], found["chosen"]
    units, widths = list(chosen), sorted({row["bits"] for row in rows})
    by = {(row["unit"], row["bits"]): row for row in rows}
    shown = found.get("weight_bit", widths[(len(widths) - 1) // 2])
    end = [[by[unit, bits]["rms_at_the_end"] for bits in widths] for unit in units]
    marked = [widths.index(chosen[unit]) for unit in units]
    steps = [f"{t:g}" for t in found["timesteps"]]
    single = [[by[unit, shown][f"{PREFIX}{t}"] for t in steps] for unit in units]
    charts = [
        Chart(
            "Error at the end, by bits (outlined: chosen)",
            heat_map(units, [f"{bits}" for bits in widths], end, "Error at the end by unit and bits", "bits", marked),
        ),
        Chart(
            f"Error of the prediction at W{shown}{_acts(found)}, by timestep",
            heat_map(units, steps, single, "Error of the prediction by unit and timestep", "timestep"),
        ),
    ]
    columns = [*COLUMNS, *((f"{PREFIX}{t}", f"RMS at t = {t}", "#.3g") for t in steps)]
    table = Table("Sensitivity of units", columns, rows)
    return Section("Sensitivity", [Text(NOTE), Charts(charts), Folded(f"All {len(rows)} values", [table])])


def sensitivity_report(found: dict[str, Any], run_log: Path) -> Report:
    """The report of a measurement alone. found: the content of sensitivity.json; run_log: may be missing."""
    log, chosen = RunLog.read(run_log), found["chosen"]
    by = {(row["unit"], row["bits"]): row for row in found["rows"]}
    rows = [by[unit, bits] for unit, bits in chosen.items()]
    table = Table("Chosen bits", [*COLUMNS[:3], COLUMNS[4]], rows)
    facts = [("model", found.get("config") or found.get("checkpoint")), ("activations", _acts(found) or "float")]
    sections = [
        command_section(log, facts),
        sensitivity_section(found),
        Section("Chosen bits", [Folded(f"All {len(rows)} units", [table])]),
    ]
    worst = max(rows, key=lambda row: row["rms_at_the_end"])
    headline = (
        f"{min(chosen.values())} to {max(chosen.values())} bits for {len(chosen)} units; with them {worst['unit']} "
        f"({worst['bits']} bits) adds most to the error at the end."
    )
    when = "" if log is None else f", {log.started[:10]}"
    return Report("What each unit costs", headline, f"{len(found['timesteps'])} sampler steps{when}", sections)


def _acts(found: dict[str, Any]) -> str:
    return "" if found["act_bits"] == 32 else f"A{found['act_bits']}"
