"""Checking golden cases, and whether images show what was asked for."""
