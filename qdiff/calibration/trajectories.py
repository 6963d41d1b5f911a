"""Float sampling states (x_t, t) of every network call of a sampler: recorded once, streamed to disk, read back.

Layouts: a folder of native shards (`shard_00000.safetensors`, one per batch of seeds), or the original toolkit's one
`.pt` dictionary with xs [S][N, C, H, W] and ts [S][N], step 0 the noisiest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qdiff.utils.files import load_pickle, read_metadata, save_safetensors

logger = logging.getLogger(__name__)
FORMAT = "qdiff-trajectories-1"
MOST_STEPS = 10**5  # of a file; samplers have a thousand at most
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
CONDITIONING = ("cs", "ucs")  # the original's names of conditional and unconditional embeddings


@dataclass(frozen=True)
class Trajectories:
    """xs: S tensors [N, C, H, W], ts: S tensors [N]; S network calls of N independent samples, noisiest first.

    `extra` holds conditioning per call under the original names (cs, ucs), S tensors each.
    """

    xs: tuple[Tensor, ...]
    ts: tuple[Tensor, ...]
    extra: dict[str, tuple[Tensor, ...]]

    @property
    def steps(self) -> int:
        """Number of recorded network calls per sample."""
        return len(self.xs)

    @property
    def samples(self) -> int:
        """Number of independent samples."""
        return len(self.xs[0])

    @property
    def timesteps(self) -> Tensor:
        """[S] float: the timestep of each call (of its first sample)."""
        return torch.stack([t.flatten()[0].double() for t in self.ts])


class Recorder:
    """Collects the network calls of one sampling run: give its `add` to the sampler's driver as observer."""

    def __init__(self) -> None:
        self.xs: list[Tensor] = []
        self.ts: list[Tensor] = []

    def add(self, call) -> None:
        """call: anything with x [N, C, H, W], t [N] and the sampler's step. Of a step's calls the first is kept."""
        if call.step < len(self.xs):  # PLMS asks twice in its first step
            return
        self.xs.append(call.x.detach().cpu().clone())
        self.ts.append(call.t.detach().cpu().clone())

    def trajectories(self, **conditioning: Tensor) -> Trajectories:
        """What has been collected. conditioning: cs and ucs of the samples, [N, ...], the same at every step."""
        extra = {key: (value.detach().cpu(),) * len(self.xs) for key, value in conditioning.items()}
        return Trajectories(tuple(self.xs), tuple(self.ts), extra)


def concatenate(parts: Iterable[Trajectories]) -> Trajectories:
    """Trajectories of several batches of samples as one.

    Raises ValueError when their steps differ, or only some have conditioning.
    """
    parts = list(parts)
    if len({part.steps for part in parts}) != 1:
        raise ValueError(f"trajectories of different lengths: {sorted({part.steps for part in parts})} steps")
    if len({frozenset(part.extra) for part in parts}) != 1:
        found = " and ".join(sorted({", ".join(sorted(part.extra)) or "none" for part in parts}))
        raise ValueError(f"trajectories with different conditioning: {found}")

    def join(columns: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if all(_constant(column) for column in columns):  # keep it one tensor: embeddings are large
            return (torch.cat([column[0] for column in columns]),) * len(columns[0])
        return tuple(torch.cat(step) for step in zip(*columns, strict=True))

    extra = {key: join([part.extra[key] for part in parts]) for key in parts[0].extra}
    return Trajectories(join([part.xs for part in parts]), join([part.ts for part in parts]), extra)


def _constant(column: tuple[Tensor, ...]) -> bool:
    """Whether a column is one tensor, the same for every step."""
    return all(step is column[0] for step in column)


def _stacked(column: tuple[Tensor, ...]) -> Tensor:
    """[S, ...]; for a column that is one tensor a view of it, which torch.save stores once."""
    return column[0].expand(len(column), *column[0].shape) if _constant(column) else torch.stack(column)


def shard_path(folder: Path, index: int) -> Path:
    """Where the shard of the index-th batch of seeds lies."""
    return Path(folder) / f"shard_{index:05d}.safetensors"


def save_shard(trajectories: Trajectories, path: Path, provenance: dict) -> None:
    """Write one native shard atomically, format and provenance as JSON in its metadata under "qdiff"."""
    tensors = {"xs": torch.stack(trajectories.xs), "ts": torch.stack(trajectories.ts)}
    for key, column in trajectories.extra.items():  # one step stands for all where they are the same
        tensors[key] = column[0][None].contiguous() if _constant(column) else torch.stack(column)
    about = {"format": FORMAT, "provenance": provenance}
    save_safetensors(tensors, path, {"qdiff": json.dumps(about, sort_keys=True)})


def shard_provenance(path: Path) -> dict:
    """The provenance a shard was written with. Raises ValueError naming a file that is not a shard."""
    about = read_metadata(path, "trajectory shard")
    if about.get("format") != FORMAT or not isinstance(about.get("provenance"), dict):
        found = str(about.get("format") or "another safetensors file")[:60]
        raise ValueError(f"{path}: expected a trajectory shard ({FORMAT}), found {found}")
    return about["provenance"]


def _load_shard(path: Path) -> Trajectories:
    shard_provenance(path)
    with safe_open(path, "pt") as shard:
        content = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    return _checked(content, path)


def _load_folder(path: Path) -> Trajectories:
    shards = sorted(path.glob("shard_*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{path}: expected shard_*.safetensors files of calibration data, found none")
    origin = shard_provenance(shards[0])
    for shard in shards[1:]:
        if shard_provenance(shard) != origin:
            raise ValueError(f"{shard}: expected calibration data made like {shards[0].name}, found other settings")
    parts = [_load_shard(shard) for shard in shards]
    try:
        found = concatenate(parts)
    except (RuntimeError, ValueError) as error:  # shards without provenance may differ in anything
        raise ValueError(f"{path}: its shards do not fit together: {error}") from error
    expected = origin.get("n_samples", found.samples)
    if found.samples != expected:
        reason = "was the recording interrupted? The same command goes on with it"
        raise ValueError(f"{path}: expected {expected} samples of calibration data, found {found.samples}; {reason}")
    return found


def load_trajectories(path: str | Path, shape: tuple[int, int, int] | None = None) -> Trajectories:
    """Read calibration data: a folder of native shards, one shard, or an original `.pt` file.

    Steps come back with the noisiest first; a file that has them in another order is sorted, with a warning.
    shape: (C, H, W) the network takes. Raises FileNotFoundError, or ValueError naming the file, what was expected and
    what was found.
    """
    path = Path(path)
    if path.is_dir():
        found = _load_folder(path)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such calibration data")
    else:
        found = _load_shard(path) if path.suffix == ".safetensors" else _load_original(path)
    if shape is not None and tuple(found.xs[0].shape[1:]) != tuple(shape):
        raise ValueError(
            f"{path}: expected calibration states of shape {tuple(shape)}, found {tuple(found.xs[0].shape[1:])}"
        )
    return _noisiest_first(found, path)


def check_times(trajectories: Trajectories, num_timesteps: int, fractions: bool, path: str | Path) -> None:
    """Raise ValueError for times that a network of `num_timesteps` steps is not asked about.

    fractions: the sampler works between timesteps, as DPM-Solver does.
    """
    times = torch.stack([t.double() for t in trajectories.ts])
    last, found = num_timesteps - 1, f"{times.min():g} ... {times.max():g}"
    between = times != times.round()
    if bool(between.any()) and trajectories.steps > 1 and times.max() <= 1:
        raise ValueError(
            f"{path}: expected timesteps 0 ... {last}, found {found}; were they divided by {num_timesteps}?"
        )
    if times.min() < 0 or times.max() > last:
        raise ValueError(f"{path}: expected timesteps 0 ... {last}, found {found}")
    if not fractions and bool(between.any()):
        first = times[between][0].item()
        reason = "only dpm_solver asks the network between timesteps"
        raise ValueError(f"{path}: expected whole timesteps 0 ... {last}, found {first:g}; {reason}")


def _noisiest_first(found: Trajectories, path: Path) -> Trajectories:
    """Selectors and rollouts take the order of the steps for that of sampling."""
    times = found.timesteps
    if bool((times[1:] <= times[:-1]).all()):
        return found
    order = times.argsort(descending=True, stable=True).tolist()
    where = f"t from {times[0]:g} to {times[-1]:g}"
    logger.warning("%s: expected the noisiest step first, found %s; the steps are sorted by t", path, where)

    def put(column: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(column[step] for step in order)

    return Trajectories(put(found.xs), put(found.ts), {key: put(column) for key, column in found.extra.items()})


def _load_original(path: Path) -> Trajectories:
    content = load_pickle(path, "file of calibration data", repeats=True)
    found, held = _checked(content, path), path.stat().st_size
    if (claimed := sum(x.nbytes for x in found.xs)) > held:
        raise ValueError(
            f"{path}: expected states of their own at every step, found {claimed} bytes in a file of {held}"
        )
    return found


def _checked(content: Any, path: Path) -> Trajectories:
    """A file's columns as trajectories. Raises ValueError naming the file, what was expected and what was found."""
    if not isinstance(content, dict) or not {"xs", "ts"} <= content.keys():
        found = [str(key)[:60] for key in [*content][:4]] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected calibration data with xs and ts, found {found}")
    columns = {key: _steps(content[key], key, path) for key in ("xs", "ts", *CONDITIONING) if key in content}
    steps = len(columns["xs"])
    columns |= {key: columns[key] * steps for key in CONDITIONING if key in columns and len(columns[key]) == 1}
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) != 1 or not columns["xs"]:
        raise ValueError(f"{path}: expected as many steps in every column, found {lengths}")
    for x, t in zip(columns["xs"], columns["ts"], strict=True):
        if x.shape != columns["xs"][0].shape or x.dim() != 4 or not len(x) or t.shape != x.shape[:1]:
            raise ValueError(
                f"{path}: expected xs [N, C, H, W] and ts [N], found {tuple(x.shape)} and {tuple(t.shape)}"
            )
        if x.dtype not in FLOATS or t.dtype not in (*FLOATS, *WHOLE):
            raise ValueError(f"{path}: expected xs of floats and ts of numbers, found {x.dtype} and {t.dtype}")
        if not (x.isfinite().all() and t.isfinite().all()):
            raise ValueError(f"{path}: expected finite calibration states, found infinite or undefined values")
    _check_conditioning(columns, path)
    return Trajectories(columns.pop("xs"), columns.pop("ts"), columns)


def _check_conditioning(columns: dict[str, tuple[Tensor, ...]], path: Path) -> None:
    """Raise ValueError for embeddings that do not go with the states, or whose sizes differ among themselves."""
    samples, given = len(columns["xs"][0]), [key for key in CONDITIONING if key in columns]
    for key in given:
        first = columns[key][0]
        if first.dim() == 0 or len(first) != samples:
            raise ValueError(f"{path}: expected {key} of {samples} samples, found shape {tuple(first.shape)}")
        # One tensor may stand for all steps.
        distinct = {(step.data_ptr(), step.shape, step.stride()): step for step in columns[key]}
        for step in distinct.values():
            if step.dtype not in (*FLOATS, *WHOLE):
                raise ValueError(f"{path}: expected {key} of numbers, found {step.dtype}")
            if step.shape != first.shape:
                wanted = f"{key} of shape {tuple(first.shape)} at every step"
                raise ValueError(f"{path}: expected {wanted}, found {tuple(step.shape)}")
            if not step.isfinite().all():
                raise ValueError(f"{path}: expected finite {key}, found infinite or undefined values")
        other = columns[given[0]][0]
        if first.shape != other.shape:
            wanted = f"{key} of shape {tuple(other.shape)}, as {given[0]}"
            raise ValueError(f"{path}: expected {wanted}, found {tuple(first.shape)}")


def _steps(column: Any, key: str, path: Path) -> tuple[Tensor, ...]:
    """A list of tensors, or a stacked one, as a tuple."""
    listed = isinstance(column, (list, tuple)) or (torch.is_tensor(column) and column.dim() > 0)
    if listed and len(column) > MOST_STEPS:
        raise ValueError(f"{path}: expected at most {MOST_STEPS} steps in {key}, found {len(column)}")
    steps = column.unbind(0) if torch.is_tensor(column) and column.dim() else column
    if not isinstance(steps, (list, tuple)) or not all(torch.is_tensor(step) for step in steps):
        raise ValueError(f"{path}: expected {key} to be a list of tensors or one stacked tensor, found something else")
    return tuple(steps)


def original_layout(trajectories: Trajectories) -> dict[str, Tensor]:
    """The dictionary that the original toolkit reads with `torch.load`: stacked xs, ts (and cs, ucs)."""
    columns = {"xs": trajectories.xs, "ts": trajectories.ts, **trajectories.extra}
    return {key: _stacked(column) for key, column in columns.items()}
