"""What families share of the diffusion process: sampling calls, how errors add up along them, noise schedules."""

from ddim.linear import LinearPath
from ddim.samplers import Call, run
from ddim.schedules import cumulative_alphas

__all__ = ["Call", "LinearPath", "cumulative_alphas", "run"]
