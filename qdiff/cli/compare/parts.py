"""The parts of a comparison, each in a process of its own: the float model's states and images, and every entry."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.api.quantize import CalibrationSettings, calibrate_network
from qdiff.calibration.context import UnitReport
from qdiff.calibration.trajectories import Trajectories, concatenate, load_trajectories, save_shard
from qdiff.checkpoints.native import load_checkpoint, save_checkpoint
from qdiff.cli.compare.plan import FLOAT, RESULT_NAME, Comparison, Entry
from qdiff.cli.compare.sampling import (
    read_notes,
    read_tensor,
    root_mean_squares,
    sample_entry,
    sample_reference,
)
from qdiff.cli.models.any_family import LoadedModel
from qdiff.cli.progress import CalibrationLog, peak_memory
from qdiff.evaluation.cost import float_bytes, stored_bytes
from qdiff.evaluation.similarity import pooled_psnr_db, to_uint8
from qdiff.utils.devices import describe_device
from qdiff.utils.files import has_bundled_models, read_json, save_safetensors, write_text
from qdiff.utils.team import Team

logger = logging.getLogger(__name__)
IMAGES_NAME, EFFORT_NAME = "images.safetensors", "calibration.json"


def run_part(comparison: Comparison, slug: str, team: Team) -> None:
    """Do what is left of one part and write its result last. slug: FLOAT, or an entry's."""
    started = time.monotonic()
    device = team.device or comparison.device
    if team.is_main:  # what a process left behind that was killed while it wrote
        half_written = [*comparison.part(slug).glob(".*"), *comparison.folder.glob(f".{slug}.safetensors.*")]
        for path in half_written:
            path.unlink()
    model = comparison.model.load(device)
    if slug == FLOAT:
        found = run_float(comparison, model, team)
    else:
        found = run_entry(comparison, comparison.entry(slug), model, team)
    if team.is_main:
        found |= {"seconds": round(time.monotonic() - started, 1), "device": describe_device(model.network)}
        write_text(comparison.part(slug) / RESULT_NAME, json.dumps(found, indent=1) + "\n")
        for path in comparison.part(slug).glob("batch_*") if slug != FLOAT else ():
            path.unlink()
        logger.info("%s: %s", slug, found)


def run_float(comparison: Comparison, model: LoadedModel, team: Team) -> dict[str, Any]:
    """Record float states, sample the images that all others are compared with, and keep what happens on the way."""
    provenance = {"family": comparison.model.adapter.family, **comparison.model.pipeline.describe(), **model.origin}
    shards = {batch: comparison.shard(i) for i, batch in enumerate(comparison.state_batches(comparison.seeds))}
    todo = team.broadcast([batch for batch, path in shards.items() if team.is_main and not path.exists()])
    for batch, part in model.record(todo, team):
        save_shard(part, shards[batch], provenance)
    sample_reference(comparison, model, team)
    peak = peak_memory(next(model.network.parameters()).device)
    if not team.is_main:
        return {}
    seconds, images = _gathered(comparison, FLOAT, team)
    return {
        "row": {
            "method": FLOAT,
            "label": FLOAT,
            "weight_bits": 32,
            "act_bits": 32,
            "psnr_db": None,
            "fd_float": None,
            **judged(comparison, images),
            "bytes": float_bytes(model.network),
            "sampling_seconds": seconds,
            "peak_memory_bytes": peak,
        },
    }


def run_entry(comparison: Comparison, entry: Entry, model: LoadedModel, team: Team) -> dict[str, Any]:
    """Calibrate, save, sample and measure one entry."""
    network = calibrated(comparison, entry, model, team)
    sample_entry(comparison, entry.slug, model, network, team)
    peak = peak_memory(next(network.parameters()).device)
    if not team.is_main:
        return {}
    seconds, images = _gathered(comparison, entry.slug, team)
    reference = read_tensor(comparison.part(FLOAT) / IMAGES_NAME, "images")
    files = [comparison.batch_file(entry.slug, i) for i in range(len(comparison.image_batches()))]
    effort = read_effort(comparison, entry.slug)
    psnr = pooled_psnr_db(images, reference)
    return {
        "row": {
            "method": entry.method,
            "label": entry.label,
            "weight_bits": entry.recipe.weights.bits,
            "act_bits": entry.act_bits,
            "per_channel": entry.per_channel,
            "psnr_db": None if math.isinf(psnr) else round(psnr, 3),
            "fd_float": fd_to_float(images, reference),
            **judged(comparison, images),
            "bytes": stored_bytes(comparison.checkpoint(entry.slug)),
            "calibration_seconds": round(effort["seconds"], 1),
            "sampling_seconds": seconds,
            "peak_memory_bytes": {kind: max(peak[kind], effort["peak_memory_bytes"].get(kind, 0)) for kind in peak},
            "accumulated": root_mean_squares(files, "accumulated"),
            "single_step": root_mean_squares(files, "single_step"),
        },
    }


def _gathered(comparison: Comparison, slug: str, team: Team) -> tuple[float, Tensor]:
    """(seconds that sampling took, all images), the images in a file of their own too."""
    files = [comparison.batch_file(slug, i) for i in range(len(comparison.image_batches()))]
    images = torch.cat([read_tensor(file, "images") for file in files])
    save_safetensors({"images": images}, comparison.part(slug) / IMAGES_NAME, {})
    return round(sum(read_notes(file)["seconds"] for file in files) / team.size, 1), images


def judged(comparison: Comparison, images: Tensor) -> dict[str, float | None]:
    """What can be said of images alone: FD to the training images, and whether they show what was asked for."""
    if not _of_cifar(images):
        return {"fd": None}
    from qdiff.evaluation.fidelity import fd_cifar10  # torch-fidelity and torchvision take seconds to import
    from qdiff.evaluation.prompts import prompt_accuracy

    found = {"fd": round(fd_cifar10(to_uint8(images)), 4)}
    entries = comparison.model.entries
    asked = [entries[i % len(entries)] for i in range(len(images))] if comparison.model.family == "text" else []
    if asked and all(map(_names_a_class, entries)):
        found["prompt_accuracy"] = prompt_accuracy(to_uint8(images), asked)
    return found


def _names_a_class(prompt: str) -> bool:
    from qdiff.evaluation.prompts import class_of_prompt

    try:
        class_of_prompt(prompt)
    except ValueError:
        return False
    return True


def fd_to_float(images: Tensor, reference: Tensor) -> float | None:
    """FD between the images of two networks; None where the features are not made for them."""
    if not _of_cifar(images):
        return None
    from qdiff.evaluation.fidelity import feature_statistics, frechet_distance

    first, second = (feature_statistics(to_uint8(these)) for these in (images, reference))
    return round(frechet_distance(first, second), 4)


def _of_cifar(images: Tensor) -> bool:
    return images.shape[1:] == (3, 32, 32) and len(images) > 1 and has_bundled_models()


def calibrated(comparison: Comparison, entry: Entry, model: LoadedModel, team: Team) -> nn.Module:
    """The entry's network: loaded where it was calibrated before an interruption, else calibrated and saved."""
    path, device = comparison.checkpoint(entry.slug), next(model.network.parameters()).device
    if team.broadcast(path.exists()):
        return load_checkpoint(path).network.to(device)
    args, adapter, trajectories = comparison.args, comparison.model.adapter, states_of(comparison, entry)
    provenance = {"seed": args.seed, "sampling": comparison.model.pipeline.describe(), **model.origin}
    record = comparison.folder / f"{entry.slug}.unfinished"
    effort = Effort(comparison.part(entry.slug), device) if team.is_main else None
    settings = CalibrationSettings(seed=args.seed, folder=record, progress=effort, team=team, provenance=provenance)
    path_of_sampler = comparison.model.pipeline.path
    run = calibrate_network(model.network, adapter, entry.recipe, trajectories, settings, path_of_sampler)
    if team.is_main:
        effort.keep()
        save_checkpoint(path, run.network, adapter, entry.recipe, trajectories.timesteps, provenance)
        run.record.remove()
    team.wait()
    return run.network


def states_of(comparison: Comparison, entry: Entry) -> Trajectories:
    """The float states that an entry takes: as many seeds as it asks for, whatever the others ask for."""
    batches = comparison.state_batches(entry.seeds)
    return _first(concatenate(load_trajectories(comparison.shard(i)) for i in range(len(batches))), entry.seeds)


def _first(trajectories: Trajectories, count: int) -> Trajectories:
    """The first `count` samples."""

    def taken(column: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if all(step is column[0] for step in column):  # embeddings, which are the same at every step
            return (column[0][:count],) * len(column)
        return tuple(step[:count] for step in column)

    extra = {key: taken(column) for key, column in trajectories.extra.items()}
    return Trajectories(taken(trajectories.xs), taken(trajectories.ts), extra)


class Effort(CalibrationLog):
    """The bar and the log of a calibration, and what it has taken so far, over all runs of an interrupted one."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder, device)
        self.file, self.started = folder / EFFORT_NAME, time.monotonic()
        self.before = _effort(self.file)

    def keep(self) -> None:
        """Write it down."""
        peak = peak_memory(self.device)
        known = self.before["peak_memory_bytes"]
        seconds = self.before["seconds"] + time.monotonic() - self.started
        most = {kind: max(size, known.get(kind, 0)) for kind, size in peak.items()}
        write_text(self.file, json.dumps({"seconds": seconds, "peak_memory_bytes": most}) + "\n")

    def finish(self) -> None:
        super().finish()
        self.keep()

    def unit(self, report: UnitReport, done: int, total: int, restored: bool = False) -> None:
        super().unit(report, done, total, restored)
        self.keep()


def _effort(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {"seconds": 0.0, "peak_memory_bytes": {}}


def read_effort(comparison: Comparison, slug: str) -> dict[str, Any]:
    """What an entry's calibration has taken: seconds, and peak memory in bytes."""
    return _effort(comparison.part(slug) / EFFORT_NAME)
