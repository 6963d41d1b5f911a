"""Images of a network, with what it does at every step: the float model's states, and a quantized one's errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qdiff.api.sampling import sample_batches
from qdiff.cli.compare.plan import FLOAT, Comparison
from qdiff.cli.models.any_family import LoadedModel
from qdiff.families.diffusion import Call, LinearPath, run
from qdiff.utils.files import read_metadata, save_safetensors
from qdiff.utils.team import Team


@dataclass
class Walk:
    """What happens to the first `count` images of a batch: every network call's x, t, eps, and sampler step."""

    count: int
    x: list[Tensor] = field(default_factory=list)  # E of [K, C, H, W]
    t: list[Tensor] = field(default_factory=list)  # E of [K]
    eps: list[Tensor] = field(default_factory=list)  # E of [K, C, H, W]
    step: list[int] = field(default_factory=list)

    def call(self, call: Call) -> None:
        """The sampler asks."""
        self.x.append(call.x[: self.count].cpu())
        self.t.append(call.t[: self.count].cpu())
        self.step.append(call.step)

    def answer(self, eps: Tensor) -> None:
        """The network has answered."""
        self.eps.append(eps[: self.count].cpu())

    def states(self, end: Tensor) -> list[Tensor]:
        """x at the input of every sampler step, and the end, [K, C, H, W] each."""
        first = [x for i, x in enumerate(self.x) if i == 0 or self.step[i] != self.step[i - 1]]
        return [*first, end[: self.count].cpu()]


@torch.no_grad()
def follow(model: LoadedModel, network: nn.Module, batch: range, walk: Walk, observe: Callable[[Call], None]) -> Tensor:
    """Sample the images of a batch, on the CPU: their x or latents [N, C, H, W]. `walk` sees what happens."""
    predict = model.predictor(network, batch)

    def answered(x: Tensor, t: Tensor) -> Tensor:
        eps = predict(x, t)
        walk.answer(eps)
        return eps

    def asked(call: Call) -> None:
        walk.call(call)
        observe(call)

    return run(model.start(batch), answered, asked).cpu()


def mean_square(difference: Tensor) -> Tensor:
    """[] float64: the mean of the squares of all elements."""
    return difference.double().square().mean()


def accumulated(walk: Walk, end: Tensor, reference: Reference) -> Tensor:
    """[S + 1] float64: mean squared error of x at the input of every step, and at the end."""
    pairs = zip(walk.states(end), reference.walk.states(reference.end), strict=True)
    return torch.stack([mean_square(found - expected) for found, expected in pairs])


@torch.no_grad()
def single_step(
    model: LoadedModel,
    network: nn.Module,
    batch: range,
    reference: Reference,
    path: LinearPath,
    observe: Callable[[Call], None],
) -> Tensor:
    """[S] float64: mean squared error that each step makes by itself, from the float trajectory's own states.

    Where a step has several calls (PLMS in its first) their errors add up.
    """
    walk, device = reference.walk, next(network.parameters()).device
    predict = model.predictor(network, batch[: walk.count])
    made: list[Tensor] = []
    for i, step in enumerate(walk.step):
        call = Call(step, walk.t[i].to(device), walk.x[i].to(device))
        observe(call)
        error = predict(call.x, call.t).cpu().double() - walk.eps[i]
        error *= path.coefficients[path.next_state(i), i]
        if i and walk.step[i - 1] == step:
            made[-1] += error
        else:
            made.append(error)
    return torch.stack([mean_square(error) for error in made])


@dataclass(frozen=True)
class Reference:
    """What the float model did with a batch: its images [N, C, H, W], and the walk and end of the first ones."""

    images: Tensor
    walk: Walk
    end: Tensor

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read a file that `write_reference` wrote."""
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        columns = {key: list(tensors[key].unbind()) for key in ("x", "t", "eps")} if "x" in tensors else {}
        walk = Walk(len(tensors.get("end", ())), **columns, step=tensors["step"].tolist())
        return cls(tensors["images"], walk, tensors.get("end", torch.empty(0)))


def write_batch(path: Path, tensors: dict[str, Tensor], **notes: Any) -> None:
    """Keep what was found for a batch."""
    save_safetensors(tensors, path, {"qdiff": json.dumps(notes)})


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of a batch's file."""
    return read_metadata(path, "batch of a comparison")


def read_tensor(path: Path, name: str, count: int | None = None) -> Tensor:
    """One tensor of a file, or the first `count` rows of it, which alone are read then."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name) if count is None else file.get_slice(name)[:count]


def _unfinished(comparison: Comparison, slug: str, team: Team) -> dict[range, Path]:
    """Batches of images that are not there yet, with the files that they go to."""
    files = {batch: comparison.batch_file(slug, i) for i, batch in enumerate(comparison.image_batches())}
    return team.broadcast({batch: path for batch, path in files.items() if team.is_main and not path.exists()})


def sample_reference(comparison: Comparison, model: LoadedModel, team: Team) -> None:
    """Write the float model's images and states, a file per batch."""
    todo, found = _unfinished(comparison, FLOAT, team), {}

    def sample(batch: range, observe: Callable) -> Tensor:
        walk, started = Walk(comparison.watched(batch)), time.monotonic()
        end = follow(model, model.network, batch, walk, observe)
        found[batch] = walk, time.monotonic() - started
        return end

    for batch, end in sample_batches(sample, comparison.model.steps, list(todo), "float images", team=team):
        walk, seconds = found.pop(batch)
        tensors = {"images": decoded(model, end), "step": torch.tensor(walk.step)}
        if walk.count:
            states = {"x": torch.stack(walk.x), "t": torch.stack(walk.t), "eps": torch.stack(walk.eps)}
            tensors |= states | {"end": end[: walk.count]}
        write_batch(todo[batch], tensors, seconds=seconds, watched=walk.count)
    team.wait()


def sample_entry(comparison: Comparison, slug: str, model: LoadedModel, network: nn.Module, team: Team) -> None:
    """Write a quantized network's images and its errors beside the float model, a file per batch."""
    todo, found = _unfinished(comparison, slug, team), {}
    references = {batch: comparison.batch_file(FLOAT, i) for i, batch in enumerate(comparison.image_batches())}
    path, steps = comparison.model.path(), comparison.model.steps

    def sample(batch: range, observe: Callable) -> Tensor:
        walk, started, errors = Walk(comparison.watched(batch)), time.monotonic(), {}
        end = follow(model, network, batch, walk, observe)
        seconds = time.monotonic() - started
        if walk.count:
            reference = Reference.load(references[batch])
            errors["accumulated"] = accumulated(walk, end, reference)
            if path is not None:  # the bar's second half
                onwards = lambda call: observe(replace(call, step=steps + call.step))  # noqa: E731
                errors["single_step"] = single_step(model, network, batch, reference, path, onwards)
        found[batch] = errors, seconds, walk.count
        return end

    title = f"{comparison.entry(slug).label} images"
    for batch, end in sample_batches(sample, (1 + (path is not None)) * steps, list(todo), title, team=team):
        errors, seconds, watched = found.pop(batch)
        write_batch(todo[batch], {"images": decoded(model, end), **errors}, seconds=seconds, watched=watched)
    team.wait()


@torch.no_grad()
def decoded(model: LoadedModel, end: Tensor) -> Tensor:
    """x or latents -> images [N, C, H, W] in [0, 1], on the CPU."""
    return model.decode(end.to(next(model.network.parameters()).device)).cpu()


def root_mean_squares(files: Sequence[Path], name: str) -> list[float] | None:
    """The root of the mean, over the images of all batches, of an error's mean squares; None where there is none."""
    counts = {file: read_notes(file)["watched"] for file in files}
    watched = [file for file in files if counts[file] and name in names_in(file)]
    if not watched:
        return None
    total = sum(counts[file] * read_tensor(file, name) for file in watched)
    return (total / sum(counts[file] for file in watched)).sqrt().tolist()


def names_in(path: Path) -> list[str]:
    """The names of a file's tensors."""
    with safe_open(path, "pt") as file:
        return list(file.keys())
