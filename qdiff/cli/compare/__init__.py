"""Comparing methods on the same states and seeds."""
