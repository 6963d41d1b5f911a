"""Helpers that know nothing of quantization: files, devices, seeds, measurements, teams of processes."""
