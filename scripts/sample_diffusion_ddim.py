#!/usr/bin/env python
"""Calibrate a pixel diffusion model (CIFAR-10, LSUN), or load a calibrated one, and sample images."""

from qdiff.cli.command import GOES_ON, run_main
from qdiff.cli.sample.ddim import main

if __name__ == "__main__":
    run_main(main, GOES_ON)
