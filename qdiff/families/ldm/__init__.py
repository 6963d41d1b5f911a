"""The latent models of `ldm`."""
