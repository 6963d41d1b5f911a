"""The public Python interface: float models, calibration data, calibration, and what comes out of it."""
