"""Random generators made from a seed and from what they are for."""

from __future__ import annotations

import numpy as np
import torch


def generator_of(seed: int, *purpose: int) -> torch.Generator:
    """A generator on the CPU. The same seed and purpose give the same draws, whatever else was drawn before."""
    state = np.random.SeedSequence((seed, *purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
