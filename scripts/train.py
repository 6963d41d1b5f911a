#!/usr/bin/env python
"""Train a model of configs/train: the pixel model, a first stage, or a latent model."""

from qdiff.cli.command import run_main
from qdiff.cli.train import main

if __name__ == "__main__":
    run_main(main, ": --resume goes on from the last checkpoint")
