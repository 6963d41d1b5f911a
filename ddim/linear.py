"""What a sampler does with the network's predictions, as a matrix: most samplers are linear in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.samplers import Call, Sampler

MAGNITUDE = 2.0**20  # impulses of another size, to find out whether a sampler is linear


@dataclass(frozen=True)
class LinearPath:
    """A sampler's network calls, E of them, and how an error of one call's prediction reaches the states after it.

    coefficients: [E + 1, E] float64; entry (m, l) is d x_m / d eps_l, x_m the input of call m and x_E the result, 0
    where m <= l. Noise that a sampler draws is the same for two trajectories from one seed, so their difference is
    e_m = sum_l coefficients[m, l] (eps'_l - eps_l), whatever the noise. scale: of guidance, 1 for none.
    """

    step: tuple[int, ...]  # [E] the sampler step of each call
    t: Tensor  # [E] the timestep of each call
    start: Tensor  # [E + 1] float64: d x_m / d x_0, of the first call's input
    coefficients: Tensor
    scale: float = 1.0

    @property
    def calls(self) -> int:
        """Network calls of one sampling run."""
        return len(self.step)

    def first_call(self, step: int) -> int:
        """The first call of a sampler step; for the step after the last one E, the index of the result."""
        return self.step.index(step) if step <= self.step[-1] else self.calls

    def next_state(self, call: int) -> int:
        """The first call of the step after that of `call`, whose input is what this step makes."""
        return self.first_call(self.step[call] + 1)


def linear_path(start: Callable[[Tensor], Sampler], scale: float = 1.0) -> LinearPath:
    """The path of a sampler. start: makes it from its first x, [N, 1, 1, 1] float64, and draws no noise.

    Raises ValueError for a sampler that is not linear in what the network predicts (one that clips).
    """
    calls = _drive(start, torch.zeros(1, 1, 1, 1, dtype=torch.float64), None)[0]
    found = _response(start, len(calls), 1.0)
    if not torch.allclose(found, _response(start, len(calls), MAGNITUDE), rtol=1e-9, atol=1e-12):
        raise ValueError("the sampler is not linear in the predicted noise (it clips), so errors have no fixed path")
    steps, t = tuple(call.step for call in calls), torch.stack([call.t[0] for call in calls])
    return LinearPath(steps, t, found[:, 0], found[:, 1:], scale)


def _response(start: Callable[[Tensor], Sampler], calls: int, size: float) -> Tensor:
    """[E + 1, 1 + E]: every call's input, and the result, for impulses in the first x and in each prediction."""
    impulses = torch.eye(1 + calls, dtype=torch.float64) * size
    asked, end = _drive(start, impulses[:, 0].view(-1, 1, 1, 1), impulses[:, 1:])
    return torch.stack([*(call.x.flatten() for call in asked), end.flatten()]) / size


def _drive(start: Callable[[Tensor], Sampler], x: Tensor, eps: Tensor | None) -> tuple[list[Call], Tensor]:
    """The calls of a run from x [N, 1, 1, 1] and its result. eps: [N, E] the answer to each call, None for 0."""
    sampler, calls, answer = start(x), [], None
    while True:
        try:
            call = sampler.send(answer)
        except StopIteration as end:
            return calls, end.value
        answer = torch.zeros_like(x) if eps is None else eps[:, len(calls)].view_as(x)
        calls.append(call)
