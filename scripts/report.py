#!/usr/bin/env python
"""Write the report of a finished folder anew: of a comparison, a calibration, or a measurement of sensitivity."""

from qdiff.cli.command import run_main
from qdiff.cli.report import main

if __name__ == "__main__":
    run_main(main)
