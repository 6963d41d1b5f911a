"""Measuring speed and memory against named baselines."""
