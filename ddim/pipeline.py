"""From image indices to images: a configuration's diffusion process, a sampler and its options, and a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ddim.linear import LinearPath, linear_path
from ddim.noise import ImageNoise
from ddim.samplers import Call, Noise, Sampler, make_sampler, run, sampler_timesteps, to_images
from ddim.schedules import beta_schedule


@dataclass(frozen=True)
class Pipeline:
    """How images are sampled: the same index and options give the same image whatever batch it is in."""

    shape: tuple[int, int, int]  # (C, H, W)
    betas: Tensor  # [T] float64
    sampler: str = "generalized"
    steps: int = 100
    skip_type: str = "uniform"
    eta: float = 0.0
    seed: int = 1234

    def __post_init__(self) -> None:
        self.timesteps()  # impossible options fail here, not in the middle of a run
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], found {self.eta}")

    @classmethod
    def from_config(cls, config: DictConfig, **options) -> Pipeline:
        """The pipeline of a configuration (see `ddim.pretrained.load_config`); options: the sampler's and the seed."""
        diffusion, size = config.diffusion, config.data.image_size
        betas = beta_schedule(
            diffusion.beta_schedule, diffusion.beta_start, diffusion.beta_end, diffusion.num_diffusion_timesteps
        )
        return cls((config.data.channels, size, size), betas, **options)

    def timesteps(self) -> Tensor:
        """[S], the timestep of each step, noisiest first."""
        return sampler_timesteps(
            self.sampler, steps=self.steps, skip_type=self.skip_type, num_timesteps=len(self.betas)
        )

    def path(self) -> LinearPath:
        """How errors of the predicted noise add up in x. Raises ValueError for ddpm_noisy, which clips."""
        try:
            return linear_path(lambda x: self._sampler(x, lambda: torch.zeros_like(x)))
        except ValueError as error:
            raise ValueError(f"{self.sampler}: {error}") from error

    def describe(self) -> dict:
        """Plain data that say how images are sampled, for provenance."""
        return {
            "sampler": self.sampler,
            "steps": self.steps,
            "skip_type": self.skip_type,
            "eta": self.eta,
            "seed": self.seed,
            "timesteps": self.timesteps().tolist(),
        }

    @torch.no_grad()
    def sample(
        self, network: nn.Module, indices: Sequence[int], observe: Callable[[Call], None] | None = None
    ) -> Tensor:
        """Images of the given indices, [N, C, H, W] in [0, 1], on the network's device.

        `observe` sees each network call before it is made.
        """
        parameter = next(network.parameters())
        noise = ImageNoise(self.seed, indices, self.shape, parameter.device, parameter.dtype)
        return to_images(run(self._sampler(noise(), noise), network, observe))

    def _sampler(self, x: Tensor, noise: Noise) -> Sampler:
        options = {"steps": self.steps, "skip_type": self.skip_type, "betas": self.betas, "eta": self.eta}
        return make_sampler(self.sampler, x, noise=noise, **options)
