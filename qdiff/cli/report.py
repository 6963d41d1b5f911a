"""Write the report of a finished folder anew: of a comparison, a calibration, or a measurement of sensitivity.

Writes report.html, one file with everything inside, into the folder. Scripts write it at their end by themselves; this
one is for folders of before, and for those that have changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qdiff.cli.compare.page import RUN_LOG, SENSITIVITY_NAME, write_page
from qdiff.cli.compare.plan import PLAN_NAME
from qdiff.cli.parser import make_parser
from qdiff.cli.quantize import CHECKPOINT_NAME
from qdiff.cli.quantize import write_report as write_calibration
from qdiff.evaluation.report import REPORT_NAME, write
from qdiff.evaluation.report_sensitivity import sensitivity_report
from qdiff.utils.files import read_json


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    names = ", ".join(WRITERS)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=f"what a script has written: has one of {names}")
    return parser.parse_args(argv)


def write_report(folder: Path) -> None:
    """Write report.html. Raises FileNotFoundError, or ValueError naming what is missing or not readable."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    names = [name for name in WRITERS if (folder / name).is_file()]
    if not names:
        raise ValueError(f"{folder}: expected one of {', '.join(WRITERS)}, found none of them")
    try:
        WRITERS[names[0]](folder)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"not what a script has written: {type(error).__name__}: {error}"
        raise ValueError(f"{folder / names[0]}, or a file beside it: {reason}") from error


def write_sensitivity(folder: Path) -> None:
    """The report of a measurement of sensitivity."""
    found = read_json(folder / SENSITIVITY_NAME)
    write(sensitivity_report(found, folder / RUN_LOG), folder / REPORT_NAME)


# By the file that tells what a folder is of.
WRITERS = {PLAN_NAME: write_page, CHECKPOINT_NAME: write_calibration, SENSITIVITY_NAME: write_sensitivity}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    write_report(args.folder)
    print(args.folder / REPORT_NAME)
