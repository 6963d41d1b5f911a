"""One calibration under way: its options, what its stages share, and what it tells about its work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.frontier import Frontier
from qdiff.calibration.optimization import Losses
from qdiff.calibration.resume import Record, put_state, state_of
from qdiff.calibration.rollout import Rollouts
from qdiff.calibration.selectors import CalibrationSet
from qdiff.calibration.store import MemoryLimits, Store
from qdiff.nn.family import Adapter, Segment
from qdiff.nn.layers import quant_layers
from qdiff.recipes.recipe import Recipe
from qdiff.utils.seeds import generator_of
from qdiff.utils.team import Team

logger = logging.getLogger(__name__)
RUN_BATCH = 16  # samples that go through a unit at once where nothing is learned


class Progress:
    """What the runner tells about its work; this one says nothing. Scripts show a bar and keep a log."""

    def start(self, title: str, total: int) -> None:
        """A stage begins that will `advance` by `total`."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Some of it is done; `note` is a short text such as the unit's name and loss."""

    def finish(self) -> None:
        """The stage is over."""

    def unit(self, report: UnitReport, done: int, total: int, restored: bool = False) -> None:
        """A unit has learned, the `done`-th of `total` of its stage; `restored`: before an interruption."""


@dataclass(frozen=True)
class UnitReport:
    """How one unit's learning went: mean squared error of its output before and after, and whether it was kept."""

    stage: int
    unit: str
    before: float
    after: float
    kept: bool
    seconds: float
    iterations: int = 0
    losses: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, notes: dict[str, Any]) -> UnitReport:
        """From plain data, as records keep it."""
        return cls(**notes | {"losses": tuple(map(tuple, notes["losses"]))})


@dataclass(frozen=True)
class RunOptions:
    """How a calibration is carried out; none of it changes the result beyond float rounding.

    record: folder for finished units, with which a killed run goes on (see `qdiff.calibration.resume`); plan: what
    determines the result, kept there. products: "float32", or "bfloat16" for half-precision products while units learn.
    frontier, optimise: how states are captured and units learn, for comparisons.
    """

    memory: MemoryLimits = MemoryLimits()
    scratch: Path | None = None  # where states go beyond the memory limit
    record: Path | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    team: Team = field(default_factory=Team)
    products: str = "float32"
    frontier: type[Frontier] = Frontier
    optimise: Callable[..., Losses] | None = None  # default: qdiff.calibration.loop.optimise


@dataclass
class Calibration:
    """A float network, its quantized copy, and what the stages share.

    unrounded_weights: what each layer's codes were rounded from, by dotted name: the float weight, or what error
    compensation made of it.
    """

    float_network: nn.Module
    network: nn.Module
    adapter: Adapter
    recipe: Recipe
    data: CalibrationSet
    seed: int
    progress: Progress
    options: RunOptions
    store: Store
    record: Record
    rollouts: Rollouts | None = None  # float trajectories with their sampler, for stages over groups of steps
    unrounded_weights: dict[str, Tensor] = field(default_factory=dict)
    reports: list[UnitReport] = field(default_factory=list)

    def unrounded_by_layer(self) -> dict[nn.Module, Tensor]:
        """The unrounded weight of each layer that has one."""
        layers = quant_layers(self.network)
        return {layers[name]: weight for name, weight in self.unrounded_weights.items()}

    def units(self) -> list[str]:
        """The segments that hold quantized layers, in the order in which they learn."""
        names = self.executed_units()
        if "definition_order" in self.recipe.compat:
            names = [name for name, _ in self.network.named_modules() if name in set(names)]
        return names

    def executed_units(self) -> list[str]:
        """The segments that hold quantized layers, in the order in which they run."""
        return [segment.name for segment in self.adapter.chain(self.network) if quant_layers(segment.module)]

    def segment(self, name: str) -> Segment:
        """A segment of the quantized network."""
        return next(segment for segment in self.adapter.chain(self.network) if segment.name == name)

    def generator(self, stage: int, unit: int = 0) -> torch.Generator:
        """The source of randomness of one piece of work: it does not depend on what was done before."""
        return generator_of(self.seed, stage, unit)

    def frontier(self, network: nn.Module, batch_size: int = RUN_BATCH) -> Frontier:
        """The states of all calibration samples, at the beginning of a network's chain."""
        return self.options.frontier(network, self.adapter, self.data, batch_size, self.store)

    def restore(self, stage: int, unit: str = "") -> dict[str, Any] | None:
        """Put a piece back that was finished before an interruption; its notes, or None if there is none.

        Of several processes the leading one has the record.
        """
        found = self.options.team.broadcast(self.record.load(stage, unit))
        if found is None:
            return None
        self._put(found[0])
        logger.info("stage %d, %s: done before the interruption", stage, unit or "all units")
        return found[1]

    def _put(self, tensors: dict[str, Tensor]) -> None:
        """Put back the state of some modules, and some unrounded weights."""
        unrounded_weights = {key: tensor for key, tensor in tensors.items() if key.startswith("bases/")}
        device = next(self.network.parameters()).device
        self.unrounded_weights |= {
            key.removeprefix("bases/"): tensor.to(device) for key, tensor in unrounded_weights.items()
        }
        put_state(self.network, {key: tensor for key, tensor in tensors.items() if key not in unrounded_weights})

    def keep(
        self,
        stage: int,
        unit: str = "",
        modules: list[str] | None = None,
        unrounded_weights: list[str] | None = None,
        notes: dict[str, Any] | None = None,
        owner: int = 0,
    ) -> dict[str, Any]:
        """Record a finished piece: the state of some modules (default: the unit), and some unrounded weights;
        return its notes.

        owner: the process that has it; the others take it over, and so go on with the same numbers bit for bit.
        """
        team, piece = self.options.team, None
        if team.rank == owner and (team.size > 1 or self.record.folder is not None):
            tensors = state_of(self.network, [unit] if modules is None else modules)
            piece = tensors | {f"bases/{name}": self.unrounded_weights[name] for name in unrounded_weights or []}
        piece, notes = team.broadcast((piece, notes or {}), owner)
        if team.rank != owner:
            self._put(piece)
        if piece is not None:
            self.record.save(stage, unit, piece, notes)
        return notes


class UndoableUnit:
    """A piece of learning that may be put back: what its modules were like when it began."""

    def __init__(self, run: Calibration, stage: int, unit: str, modules: list[str]) -> None:
        self.run, self.stage, self.unit = run, stage, unit
        self.started, self.state = time.monotonic(), state_of(run.network, modules)

    def finish(self, before: float, after: float, keep: str, iterations: int, losses: Losses) -> dict[str, Any]:
        """Put it back unless it is to be kept ("always", or "better" than before); its report as plain data."""
        kept = keep == "always" or after < before
        if not kept:
            put_state(self.run.network, self.state)
        seconds, outcome = time.monotonic() - self.started, "kept" if kept else "put back"
        logger.info("%s: error %.4g -> %.4g, %s, %.1f s", self.unit, before, after, outcome, seconds)
        return asdict(UnitReport(self.stage, self.unit, before, after, kept, seconds, iterations, tuple(losses)))
