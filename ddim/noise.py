"""Noise that belongs to the image, not to the batch it is drawn in."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ImageNoise:
    """Standard normal noise from one generator per image: call -> [N, C, H, W], fresh at each call.

    The k-th draw for image i depends on (seed, i, k) alone. Drawn on the CPU in float32, so that neither the
    device nor the precision changes the images. Raises ValueError for a negative seed or index.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],  # one per image of the batch
        shape: tuple[int, int, int],  # of one image, (C, H, W)
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ):
        if seed < 0 or any(index < 0 for index in indices):
            raise ValueError(f"seed and image indices must not be negative, found seed {seed}, indices {list(indices)}")
        self.shape = tuple(shape)
        self.device = device
        self.dtype = dtype
        self.generators = [_generator(seed, index) for index in indices]

    def __call__(self) -> Tensor:
        if not self.generators:
            return torch.empty((0, *self.shape), device=self.device, dtype=self.dtype)
        draws = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(draws).to(device=self.device, dtype=self.dtype)


def _generator(seed: int, index: int) -> torch.Generator:
    state = np.random.SeedSequence((int(seed), int(index))).generate_state(1, np.uint64)
    return torch.Generator("cpu").manual_seed(int(state[0]))
