"""The pixel models of `ddim`."""
