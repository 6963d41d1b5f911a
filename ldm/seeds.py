"""Random generators made from a seed and what they are for, so that no state has to be kept between draws."""

import numpy as np
import torch


def derived_seed(*words: int) -> int:
    """A 64-bit seed that depends on all `words`, none of them negative: (seed, epoch, batch, rank), for example."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def generator(*words: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` that depends on `words` alone. Raises ValueError for a negative one."""
    return torch.Generator(device).manual_seed(derived_seed(*words))
