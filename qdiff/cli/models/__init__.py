"""Models that flags name: how they are found, loaded, conditioned and sampled."""
