#!/usr/bin/env python
"""Calibrate a text-to-image model (Stable Diffusion), or load a calibrated one, and sample images of prompts."""

from qdiff.cli.command import GOES_ON, run_main
from qdiff.cli.sample.txt2img import main

if __name__ == "__main__":
    run_main(main, GOES_ON)
