#!/usr/bin/env python
"""Write a calibrated network for where it is to run: packed, as ONNX, or in Q-Diffusion's format."""

from qdiff.cli.command import run_main
from qdiff.cli.export import main

if __name__ == "__main__":
    run_main(main)
