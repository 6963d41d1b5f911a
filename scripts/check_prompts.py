#!/usr/bin/env python
"""How often the bundled CIFAR-10 classifier names the prompt's class in the images of runs of txt2img.py."""

from qdiff.cli.check.prompts import main
from qdiff.cli.command import run_main

if __name__ == "__main__":
    run_main(main)
