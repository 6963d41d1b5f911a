"""Groups of denoising steps run by two networks from the same state: how far apart they end, and its gradient.

AccuQuant (arXiv 2510.20348). All is said in errors: e_m, how far the quantized trajectory is from the float one at the
input of network call m, is a fixed linear function of the differences d_l of the predictions before it,
e_m = sum_l c[m, l] d_l, with the sampler's coefficients c (`ddim.linear`), whatever noise both take. So a group needs
the float states, the float predictions, and c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from qdiff.calibration.store import Column, Store
from qdiff.calibration.trajectories import CONDITIONING, Trajectories
from qdiff.nn.family import Adapter
from qdiff.nn.step_table import StepTable


class Path(Protocol):
    """A sampler's calls and coefficients: see `ddim.linear.LinearPath`."""

    step: tuple[int, ...]
    t: Tensor
    start: Tensor
    coefficients: Tensor
    scale: float
    calls: int

    def first_call(self, step: int) -> int:
        """The first call of a sampler step."""

    def next_state(self, call: int) -> int:
        """The first call of the following step."""


@dataclass(frozen=True)
class Rollouts:
    """Float trajectories, and the path of the sampler that made them. Raises ValueError where they do not agree."""

    trajectories: Trajectories
    path: Path

    def __post_init__(self) -> None:
        steps = self.path.step[-1] + 1
        wanted = torch.stack([self.path.t[self.path.first_call(step)].double() for step in range(steps)])
        found = self.trajectories.timesteps
        if len(found) != steps or not torch.allclose(found, wanted):
            a, b = (f"{len(t)} steps ({', '.join(f'{v:g}' for v in t[:3])} ...)" for t in (wanted, found))
            raise ValueError(f"calibration data: rollouts need states of the same sampler, expected {a}, found {b}")


@dataclass(frozen=True)
class Group:
    """Consecutive steps: network calls `calls`, and the row of the coefficients where the group ends."""

    number: int
    calls: range
    end: int


def groups_of(path: Path, table: StepTable) -> list[Group]:
    """The step groups of a sampler: runs of steps whose timesteps have the same parameter set."""
    of_call = [int(table.groups_of(path.t[path.first_call(step)].view(1).cpu())) for step in path.step]
    starts = [m for m in range(len(of_call)) if m == 0 or of_call[m] != of_call[m - 1]]
    ends = [*starts[1:], len(of_call)]
    return [Group(of_call[a], range(a, b), path.next_state(b - 1)) for a, b in zip(starts, ends, strict=True)]


class Predictor:
    """A network's (guided) prediction for samples of the trajectories at a call."""

    def __init__(self, network: nn.Module, adapter: Adapter, rollouts: Rollouts) -> None:
        self.network, self.adapter, self.path = network, adapter, rollouts.path
        self.parameter = next(network.parameters())
        extra = rollouts.trajectories.extra
        self._contexts = [extra[key] for key in CONDITIONING if key in extra]  # S of [N, ...] each

    def _context(self, column: tuple[Tensor, ...], call: int, index: Tensor) -> Tensor:
        context = column[self.path.step[call]][index.cpu()]
        return context.to(self.parameter if context.is_floating_point() else self.parameter.device)

    def __call__(self, call: int, index: Tensor, x: Tensor) -> Tensor:
        """x: [B, C, H, W], the inputs of samples `index` [B] at a call. Returns the predicted noise, guided."""
        t = self.path.t[call].to(x.device).expand(len(x))
        t = t.to(torch.promote_types(x.dtype, torch.float32)) if t.is_floating_point() else t
        contexts = [self._context(column, call, index) for column in self._contexts]
        guided = len(contexts) == 2 and self.path.scale != 1
        if not guided:
            return self._run(x, t, contexts[0] if contexts else None)
        both = self._run(torch.cat([x, x]), torch.cat([t, t]), torch.cat([contexts[1], contexts[0]]))
        unconditional, conditional = both.chunk(2)
        return unconditional + self.path.scale * (conditional - unconditional)

    def _run(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return self.network(x, t, **self.adapter.conditioning(self.network, context))


class FloatRuns:
    """The float trajectories of some samples: the input x_m of every call and its prediction eps_m, in a store.

    Inputs of first calls are the recorded states; those of further calls inside a step (PLMS has one, and no noise)
    follow from the predictions before them.
    """

    def __init__(self, predict: Predictor, rollouts: Rollouts, samples: int, store: Store, batch_size: int) -> None:
        self.samples, self.path = samples, rollouts.path
        self.x: list[Column] = []
        self.eps: list[Column] = []
        for call, step in enumerate(self.path.step):
            recorded = rollouts.trajectories.xs[step][:samples]
            x, eps = (store.column(samples, recorded[:1].to(predict.parameter.dtype)) for _ in range(2))
            for rows in torch.arange(samples, device=predict.parameter.device).split(batch_size):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                first = call == self.path.first_call(step)
                inputs = recorded[part].to(predict.parameter) if first else self._between(call, rows)
                x[part] = inputs
                with torch.no_grad():
                    eps[part] = predict(call, rows, inputs)
            self.x.append(x)
            self.eps.append(eps)

    def _between(self, call: int, rows: Tensor) -> Tensor:
        """The input of a call inside a step, from the first state and all predictions before it."""
        weights = self.path.coefficients[call, :call].tolist()
        past = (weight * eps[rows] for weight, eps in zip(weights, self.eps, strict=True))
        return sum(past, self.path.start[call].item() * self.x[0][rows])


Carried = dict[int, Column]  # row of the coefficients -> the error there that earlier groups have made


class GroupRollout:
    """One group of steps: the quantized network's errors along it, and their gradient.

    carried: errors from the groups before, at the inputs of this group's calls and at its end; None where both
    networks start from the float state.
    """

    def __init__(self, predict: Predictor, runs: FloatRuns, group: Group, carried: Carried | None = None) -> None:
        self.predict, self.runs, self.group, self.carried = predict, runs, group, carried
        self.c = runs.path.coefficients

    def error(self, row: int, differences: dict[int, Tensor], index: Tensor) -> Tensor | float:
        """e at a row of the coefficients: the input of a call, or the group's end."""
        total: Tensor | float = 0.0 if self.carried is None else self.carried[row][index]
        for call, difference in differences.items():
            if call < row and (weight := self.c[row, call].item()) != 0:
                total = total + weight * difference
        return total

    def difference(self, call: int, error: Tensor | float, index: Tensor, leaf: bool = False) -> tuple[Tensor, Tensor]:
        """(d of a call whose input is off by `error`, that input); leaf: the input takes gradients of its own."""
        x = self.runs.x[call][index] + error
        if leaf:
            x = x.detach().requires_grad_(True)
        return self.predict(call, index, x) - self.runs.eps[call][index], x

    @torch.no_grad()
    def run(self, index: Tensor, calls: Sequence[int] | None = None) -> dict[int, Tensor]:
        """d of the group's calls (or of the first of them, `calls`) for samples `index` [B]."""
        differences: dict[int, Tensor] = {}
        for call in self.group.calls if calls is None else calls:
            differences[call], _ = self.difference(call, self.error(call, differences, index), index)
        return differences

    def loss(self, index: Tensor) -> Tensor:
        """Mean squared error at the group's end, without gradients."""
        return self.error(self.group.end, self.run(index), index).square().mean()

    def backward(self, index: Tensor, gradient: str, carry: bool = True, share: float = 1.0) -> Tensor:
        """Add the loss's gradient to the learned parameters; return the loss. share: of the batch, for teams.

        See `qdiff.recipes.stages.Rollout` for `gradient` and `carry`.
        """
        if gradient == "unrolled":
            return self._unrolled(index, share)
        *early, last = self.group.calls
        differences = self.run(index, early)
        keeps_jacobian = gradient == "exact"
        # The last call's pass is run once, with its graph: nothing of it has to be stored in between.
        final, x = self.difference(last, self.error(last, differences, index), index, keeps_jacobian)
        end = self.error(self.group.end, differences | {last: final.detach()}, index)
        loss, by_end = end.square().mean() * share, end * (2 * share / end.numel())
        by_input: dict[int, Tensor] = {}  # dL/dx_m of calls already gone through, where the Jacobian is kept
        for call in reversed(self.group.calls):
            if call != last:
                final, x = self.difference(call, self.error(call, differences, index), index, keeps_jacobian)
            weight = self.c[self.group.end if carry else self.runs.path.next_state(call), call].item()
            cotangent = weight * by_end
            for later, gradient_of_input in by_input.items():
                cotangent = cotangent + self.c[later, call].item() * gradient_of_input
            final.backward(cotangent)
            if keeps_jacobian:
                by_input[call] = x.grad
            del final, x
        return loss

    def _unrolled(self, index: Tensor, share: float) -> Tensor:
        differences: dict[int, Tensor] = {}
        for call in self.group.calls:
            differences[call], _ = self.difference(call, self.error(call, differences, index), index)
        loss = self.error(self.group.end, differences, index).square().mean() * share
        loss.backward()
        return loss.detach()

    def over_all(self, measure: Callable[[Tensor], Tensor], batch_size: int) -> Tensor:
        """The mean of a measure of batches, over all samples."""
        device = self.predict.parameter.device
        parts = torch.arange(self.runs.samples, device=device).split(batch_size)
        return sum(measure(index) * (len(index) / self.runs.samples) for index in parts)


class Carrier:
    """What the groups done so far have made of the quantized trajectories: their differences d, in a store."""

    def __init__(self, runs: FloatRuns, store: Store, batch_size: int) -> None:
        self.runs, self.store = runs, store
        self.parts = torch.arange(runs.samples, device=store.device).split(batch_size)
        self.differences: dict[int, Column] = {}

    def into(self, group: Group) -> Carried:
        """The errors that reach a group's calls and its end."""
        found: Carried = {}
        for row in [*group.calls, group.end]:
            found[row] = self._column()
            for index in self.parts:
                weights = [(call, self.runs.path.coefficients[row, call].item()) for call in self.differences]
                zero = torch.zeros_like(self.runs.x[0][index])
                parts = (weight * self.differences[call][index] for call, weight in weights if weight)
                found[row][_rows(index)] = sum(parts, zero)
        return found

    def add(self, rollout: GroupRollout) -> None:
        """A group has learned: run it, and keep its differences."""
        columns = {call: self._column() for call in rollout.group.calls}
        for index in self.parts:
            for call, difference in rollout.run(index).items():
                columns[call][_rows(index)] = difference
        self.differences |= columns

    def _column(self) -> Column:
        return self.store.column(self.runs.samples, self.runs.x[0][slice(0, 1)])


def _rows(index: Tensor) -> slice:
    return slice(int(index[0]), int(index[-1]) + 1)
