"""Calibration: float sampling states, unit inputs, the optimisation loop, and the runner that carries out a recipe."""
