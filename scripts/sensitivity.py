#!/usr/bin/env python
"""Measure what quantizing each unit alone costs, and choose bits for every unit under a budget."""

from qdiff.cli.command import run_main
from qdiff.cli.sensitivity import main

if __name__ == "__main__":
    run_main(main)
