#!/usr/bin/env python
"""Measure speed as ratios taken in one process against a named baseline."""

from qdiff.cli.benchmark.command import main
from qdiff.cli.command import run_main

if __name__ == "__main__":
    run_main(main)
