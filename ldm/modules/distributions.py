"""The encoder's posterior of a KL first stage (arXiv 1312.6114)."""

import math

import torch
from torch import Tensor

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # keeps exp() finite in float32, as in the published training


class DiagonalGaussianDistribution:
    """N(mean, diag(exp(logvar))) for each image of a batch.

    parameters: [N, 2C, h, w], the means first, then the log-variances, which are clamped to [-30, 20].
    Raises ValueError for an odd number of channels.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        if parameters.shape[1] % 2:
            raise ValueError(f"expected as many log-variances as means, found {parameters.shape[1]} channels in all")
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)
        self.deterministic = deterministic  # a point: samples are the mean, divergences 0
        self.var = torch.zeros_like(self.mean) if deterministic else self.logvar.exp()
        self.std = torch.zeros_like(self.mean) if deterministic else (0.5 * self.logvar).exp()

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """mean + std·noise, [N, C, h, w]. The standard normal noise is given, or drawn from `generator`.

        Raises ValueError unless exactly one of the two is given (a point needs neither).
        """
        if self.deterministic:
            return self.mean
        if (generator is None) == (noise is None):
            raise ValueError("a sample needs a generator or its noise, and not both")
        if noise is None:
            # Drawn where the generator lives: the same seed gives the same numbers on every device.
            noise = torch.randn(self.mean.shape, generator=generator, device=generator.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The mean, [N, C, h, w]."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """KL(self ‖ other) in nats, summed over each image: [N]. The standard normal takes the place of None."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        if other is None:
            terms = self.mean.square() + self.var - 1 - self.logvar
        else:
            moved = (self.mean - other.mean).square()
            terms = (moved + self.var) / other.var - 1 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor) -> Tensor:
        """-log density of `sample` [N, C, h, w] in nats, summed over each image: [N]."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        terms = math.log(2 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.flatten(1).sum(1)
