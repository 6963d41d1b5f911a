"""A calibrated network run for real: integer products, GPU kernels, ONNX."""
