"""From image indices to latents: a diffusion process, a sampler and its options, guidance, and a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddim.linear import LinearPath, linear_path
from ddim.noise import ImageNoise
from ddim.samplers import Call, Noise, Sampler, check_alphas, run
from ddim.schedules import cumulative_alphas
from ldm.samplers import check_eta, guided, make_sampler, sampler_timesteps


@dataclass(frozen=True)
class Conditioning:
    """What a batch of images is conditioned on. Raises ValueError where the two differ in shape."""

    context: Tensor  # [N, L, D] for cross attention, or [N] labels of a class-conditional network
    unconditional: Tensor | None = None  # the same shape: the empty prompt, or the label of no class

    def __post_init__(self) -> None:
        if self.unconditional is not None and self.unconditional.shape != self.context.shape:
            found, expected = tuple(self.unconditional.shape), tuple(self.context.shape)
            raise ValueError(f"unconditional must have the shape of the context, {expected}, found {found}")

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """Both on the device; embeddings also in dtype, labels as they are."""

        def move(c: Tensor | None) -> Tensor | None:
            return c if c is None else c.to(device, dtype if c.is_floating_point() else c.dtype)

        return Conditioning(move(self.context), move(self.unconditional))


@dataclass(frozen=True)
class Pipeline:
    """How latents are sampled: the same index and options give the same latents whatever batch they are in.

    Raises ValueError for impossible options.
    """

    shape: tuple[int, int, int]  # (C, h, w) of the latents
    betas: Tensor  # [T] float64
    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0  # dpm_solver and ddpm do not use it
    scale: float = 1.0  # of guidance; 1 is none
    seed: int = 42

    def __post_init__(self) -> None:
        # Impossible options fail here, not in the middle of a run.
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"the shape of latents must be three positive numbers (C, h, w), found {self.shape}")
        self.timesteps()
        check_eta(self.sampler, self.eta)
        check_alphas(self.sampler, cumulative_alphas(self.betas))
        if not math.isfinite(self.scale):
            raise ValueError(f"the guidance scale must be finite, found {self.scale}")
        if self.seed < 0:
            raise ValueError(f"the seed must not be negative, found {self.seed}")

    def timesteps(self) -> Tensor:
        """[S], the timestep of the first network call of each step, noisiest first."""
        return sampler_timesteps(self.sampler, steps=self.steps, num_timesteps=len(self.betas))

    def path(self) -> LinearPath:
        """How errors of the predicted (guided) noise add up in the latents."""
        return linear_path(lambda x: self._sampler(x, lambda: torch.zeros_like(x)), self.scale)

    def describe(self) -> dict:
        """Plain data that say how latents are sampled, for provenance."""
        return {
            "sampler": self.sampler,
            "steps": self.steps,
            "eta": self.eta,
            "scale": self.scale,
            "seed": self.seed,
            "timesteps": self.timesteps().tolist(),
        }

    @torch.no_grad()
    def sample(
        self,
        network: nn.Module,
        indices: Sequence[int],
        conditioning: Conditioning | None = None,
        observe: Callable[[Call], None] | None = None,
        codes: Sequence[int] | None = None,
    ) -> Tensor:
        """Latents of the images of the given indices, [N, C, h, w], on the network's device.

        The network is called as network(x, t), or network(x, t, context) with conditioning; `observe` sees each call
        of batch N before it is made, guidance doubles the batch after that. The starting noise of an image is the
        first draw for its index, or for its code where `codes` (one per image) are given; the noise of later steps
        is in both cases the second and following draws for its index. So images that share a code share the start
        alone, and codes equal to the indices change nothing.

        Raises ValueError where conditioning or codes are not one per image, and for a guidance scale other than 1
        without an unconditional half to guide away from.
        """
        parameter = next(network.parameters())
        device, dtype = parameter.device, parameter.dtype
        noise = ImageNoise(self.seed, indices, self.shape, device, dtype)
        start = noise()
        if codes is not None:
            _check_length("codes", codes, indices)
            start = ImageNoise(self.seed, codes, self.shape, device, dtype)()
        return run(self._sampler(start, noise), self._guided(network, conditioning, indices, parameter), observe)

    def _sampler(self, x: Tensor, noise: Noise) -> Sampler:
        return make_sampler(self.sampler, x, steps=self.steps, betas=self.betas, eta=self.eta, noise=noise)

    def _guided(
        self, network: nn.Module, conditioning: Conditioning | None, indices: Sequence[int], like: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        if self.scale != 1 and (conditioning is None or conditioning.unconditional is None):
            raise ValueError(f"guidance with scale {self.scale:g} needs unconditional conditioning, found none")
        if conditioning is None:
            return guided(network, None, None, self.scale)
        _check_length("conditioning", conditioning.context, indices)
        conditioning = conditioning.to(like.device, like.dtype)
        return guided(network, conditioning.context, conditioning.unconditional, self.scale)


def _check_length(what: str, found: Sequence | Tensor, indices: Sequence[int]) -> None:
    if len(found) != len(indices):
        raise ValueError(f"{what} must be one per image, expected {len(indices)}, found {len(found)}")
