"""Sampling images: pixel models, latent models, text-to-image models."""
