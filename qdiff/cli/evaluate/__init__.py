"""Measuring images, and the cost of a model."""
