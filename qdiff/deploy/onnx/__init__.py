"""Calibrated networks as ONNX models, and ONNX Runtime as what runs them on a CPU."""
