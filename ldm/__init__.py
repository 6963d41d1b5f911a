"""Latent diffusion: networks, first stages, text encoders, samplers and checkpoints. Knows nothing of quantization."""
