"""Files of calibrated models: the native format, Q-Diffusion's, and packed codes."""
