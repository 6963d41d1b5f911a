#!/usr/bin/env python
"""Run a golden case in float64 and print how far each output is from the recorded one; exit 1 above the tolerance."""

from qdiff.cli.check.checkpoint import main
from qdiff.cli.command import run_main

if __name__ == "__main__":
    run_main(main)
