#!/usr/bin/env python
"""Measure images: folders, .npz files, or samples of a model; against a reference, and against the float model's."""

from qdiff.cli.command import GOES_ON, run_main
from qdiff.cli.evaluate.command import main

if __name__ == "__main__":
    run_main(main, GOES_ON)
