#!/usr/bin/env python
"""Record float sampling states for calibration: one sampling run keeps every step of as many seeds as asked."""

from qdiff.cli.command import GOES_ON, run_main
from qdiff.cli.record import main

if __name__ == "__main__":
    run_main(main, GOES_ON)
