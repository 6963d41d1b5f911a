"""Quantized layers: the arithmetic of grids, quantizers, ranges, and surgery that puts them into a network."""
