#!/usr/bin/env python
"""Calibrate one model by several methods on the same float states and compare what they make of the same seeds."""

from qdiff.cli.command import GOES_ON, run_main
from qdiff.cli.compare.command import main

if __name__ == "__main__":
    run_main(main, GOES_ON)
