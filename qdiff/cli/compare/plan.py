"""What a comparison runs: entries from flags and recipe files, and the plan by which it is known again."""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from qdiff.api.quantize import needs_rollouts
from qdiff.api.sampling import FIRST_CALIBRATION_IMAGE, batches
from qdiff.calibration.resume import differences
from qdiff.calibration.selectors import check_selection
from qdiff.calibration.trajectories import Trajectories, shard_path
from qdiff.cli.errors import told
from qdiff.cli.models.any_family import ChosenModel
from qdiff.methods import METHODS, MethodOptions, make_recipe, require_stages
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.overrides import apply_overrides
from qdiff.recipes.recipe import Recipe
from qdiff.recipes.stages import Rollout
from qdiff.utils.files import parse_yaml, read_json, sha256, write_text

FLOAT, PLAN_NAME, RESULT_NAME = "float", "comparison.yaml", "result.json"
DEFAULT_METHODS = ["nearest", "gptq", "quick"]
LATENT_BATCH = 16  # images sampled at once where neither flag nor configuration says how many


@dataclass(frozen=True)
class Entry:
    """One recipe, and the name that it goes by."""

    label: str
    method: str
    recipe: Recipe

    @property
    def slug(self) -> str:
        """The name of the entry's files."""
        return f"{self.label.replace(':', '-')}_w{self.recipe.weights.bits}a{self.act_bits}"

    @property
    def act_bits(self) -> int:
        """Bits of activations, 32 for float ones."""
        return 32 if self.recipe.activations is None else self.recipe.activations.bits

    @property
    def per_channel(self) -> bool:
        """Whether activations have a scale per channel."""
        return self.recipe.activations is not None and self.recipe.activations.axis == "in_channel"

    @property
    def seeds(self) -> int:
        """Recorded samples that the recipe takes."""
        stages = (stage.samples or 1 for stage in self.recipe.stages if isinstance(stage, Rollout))
        return max(self.recipe.selector.seeds, *stages, 1)


def make_entries(args: argparse.Namespace, family: str) -> list[Entry]:
    """What --methods, --weight_bit, --act_bit, --recipe and --set ask for. Raises ValueError naming the flag."""
    for bits in args.act_bit:
        if 8 < bits < 32:
            raise ValueError(f"--act_bit {bits}: expected 2 to 8, or 32 for float activations")
    methods = args.methods or ([] if args.recipe else DEFAULT_METHODS)
    options = MethodOptions(
        act_symmetric=args.a_sym,
        softmax_bits=args.sm_abit,
        split=args.split,
        selector_steps=args.cali_st,
        per_step=args.cali_n,
        rounding_start=args.rounding_start,
        family=family,
    )
    found = [
        _entry_of_method(label, replace(options, weight_bits=weights, act_bits=None if acts == 32 else acts))
        for weights in args.weight_bit
        for acts in args.act_bit
        for label in methods
    ]
    found = _with_overrides(found + [_entry_of_file(path) for path in args.recipe], args.set or ())
    by_slug: dict[str, Entry] = {}
    for entry in found:
        if by_slug.setdefault(entry.slug, entry) != entry:
            raise ValueError(f"{entry.slug}: two entries have this name, but differ; rename the recipe file")
    return list(by_slug.values())


def _entry_of_method(label: str, options: MethodOptions) -> Entry:
    method, colon, iterations = label.partition(":")
    if method not in METHODS or colon and not (iterations.isdecimal() and int(iterations) > 0):
        valid = ", ".join(METHODS)
        raise ValueError(f"--methods {label}: expected METHOD or METHOD:ITERATIONS, METHOD one of {valid}")
    if iterations:  # the two stages of q-diffusion keep their published proportion
        options = replace(options, iterations=int(iterations), act_iterations=math.ceil(int(iterations) / 4))
    return Entry(label, method, make_recipe(method, options))


def _entry_of_file(path: Path) -> Entry:
    if not path.is_file():
        raise FileNotFoundError(f"--recipe {path}: no such file")
    recipe = Recipe.load(path)
    try:
        require_stages(recipe)
    except ValueError as error:
        raise ValueError(f"--recipe {path}: {error}") from error
    return Entry(path.stem, recipe.name, recipe)


def _with_overrides(entries: list[Entry], assignments: Sequence[str]) -> list[Entry]:
    """The entries after --set; METHOD:PATH=VALUE is for the entries of that label or method."""
    meant: list[list[str]] = [[] for _ in entries]
    for text in assignments:
        before, equals, value = text.partition("=")
        name, colon, path = before.rpartition(":")
        fits = [not colon or name in (entry.label, entry.method) for entry in entries]
        if not any(fits):
            known = ", ".join(dict.fromkeys(entry.label for entry in entries))
            raise ValueError(f"--set {text}: expected a method that is compared, {known}, found {name!r}")
        for chosen, fit in zip(meant, fits, strict=True):
            chosen += [f"{path}{equals}{value}"] * fit
    changed = []
    for entry, chosen in zip(entries, meant, strict=True):
        try:
            recipe = apply_overrides(entry.recipe, chosen) if chosen else entry.recipe
        except ValueError as error:
            raise ValueError(f"{entry.label}: {told(error)}") from error
        changed.append(replace(entry, recipe=recipe))
    return changed


@dataclass(frozen=True)
class Comparison:
    """A comparison that has been checked: the model, the entries, and where everything lies."""

    args: argparse.Namespace
    model: ChosenModel
    entries: list[Entry]
    device: torch.device

    @property
    def folder(self) -> Path:
        """Where all files go."""
        return self.args.outdir

    @property
    def batch_size(self) -> int:
        """Images sampled at once."""
        return self.args.batch_size or self.model.batch_size or LATENT_BATCH

    def image_batches(self) -> list[range]:
        """The indices of the images that are compared."""
        return list(batches(0, self.args.n_samples, self.batch_size))

    def watched(self, batch: range) -> int:
        """How many images of a batch are followed step by step: its first ones."""
        return max(0, min(len(batch), self.args.n_errors - batch.start))

    def state_batches(self, seeds: int) -> list[range]:
        """The indices of calibration images for so many seeds, in full batches: more seeds are further batches."""
        count = math.ceil(seeds / self.batch_size) * self.batch_size
        return list(batches(FIRST_CALIBRATION_IMAGE, count, self.batch_size))

    @cached_property
    def seeds(self) -> int:
        """Recorded samples that the greediest entry takes."""
        return max(entry.seeds for entry in self.entries)

    def entry(self, slug: str) -> Entry:
        """The entry of that name. Raises ValueError where there is none."""
        for entry in self.entries:
            if entry.slug == slug:
                return entry
        raise ValueError(f"--only {slug}: expected {FLOAT} or one of {', '.join(e.slug for e in self.entries)}")

    def part(self, slug: str) -> Path:
        """The folder of the float model's files, or of an entry's."""
        return self.folder / slug

    def shard(self, number: int) -> Path:
        """Where float sampling states of a batch of seeds lie."""
        return shard_path(self.part(FLOAT), number)

    def batch_file(self, slug: str, number: int) -> Path:
        """Where a batch of images lies, until all are there."""
        return self.part(slug) / f"batch_{number:05d}.safetensors"

    def checkpoint(self, slug: str) -> Path:
        """Where an entry's checkpoint lies."""
        return self.folder / f"{slug}.safetensors"

    def result(self, slug: str) -> dict[str, Any] | None:
        """What a finished part has found; None for an unfinished one, and for too few float states."""
        path = self.part(slug) / RESULT_NAME
        if not path.is_file():
            return None
        if slug == FLOAT and not all(self.shard(i).exists() for i in range(len(self.state_batches(self.seeds)))):
            return None
        return read_json(path)

    def plan(self) -> dict[str, Any]:
        """All that determines the results, as plain data."""
        model, args = self.model, self.args
        return {
            "family": model.family,
            "sampling": model.pipeline.describe(),
            "asked_for": _digest(model.entries),
            "seed": args.seed,
            "n_samples": args.n_samples,
            "n_errors": args.n_errors,
            "batch_size": self.batch_size,
            "model": model.plain_config(),
            "runs": {entry.slug: entry.recipe.to_dict() for entry in self.entries},
        }

    def check_recipes(self) -> None:
        """Raise ValueError where a recipe does not fit the network or the sampler, naming the entry or the flag."""
        steps, timesteps = self.model.steps, self.model.pipeline.timesteps().double()
        with torch.device("meta"):
            network = self.model.build()
        for entry in self.entries:
            asked = entry.recipe.selector.steps
            if asked > steps and entry.recipe.selector.name != "density_variety":
                raise ValueError(f"--cali_st {asked}: --timesteps {self.args.timesteps} makes only {steps} steps")
            if needs_rollouts(entry.recipe) and self.model.path() is None:
                raise ValueError(f"{entry.label}: follows the sampler's steps, which {self.args.sample_type} clips")
            states = torch.empty(entry.seeds, 0)  # as many as there will be
            times = tuple(t.expand(entry.seeds) for t in timesteps)
            try:
                check_selection(Trajectories((states,) * steps, times, {}), entry.recipe)
                insert_quantizers(copy.deepcopy(network), entry.recipe, self.model.adapter, timesteps)
            except ValueError as error:
                raise ValueError(f"{entry.label}: {told(error)}") from error

    def check_weights(self) -> str:
        """The SHA-256 of the float weights. Raises what loading them raises, unless they have done their work."""
        if self.result(FLOAT) is None:
            self.model.load(torch.device("cpu"))
        return sha256(self.model.weights())

    def settle(self, digest: str) -> None:
        """Write comparison.yaml, or add to it, so that what is done is known again.

        Raises ValueError where the folder holds a comparison of another plan, naming what differs.
        """
        path = self.folder / PLAN_NAME
        wanted = json.loads(json.dumps({"source_sha256": digest, **self.plan()}))
        found = _read_plan(path) if path.is_file() else wanted
        runs = found["runs"] | {slug: wanted["runs"][slug] for slug in wanted["runs"] if slug not in found["runs"]}
        common = {slug: runs[slug] for slug in wanted["runs"]}
        if {**found, "runs": common} != wanted:
            what = differences({**found, "runs": common}, wanted)
            raise ValueError(f"{path}: holds a comparison of another plan: {what}; choose another --outdir")
        write_text(path, yaml.safe_dump({**wanted, "runs": runs}, sort_keys=False, width=100, allow_unicode=True))


def _digest(entries: Sequence[str | int]) -> dict[str, Any] | None:
    if not entries:
        return None
    from qdiff.cli.models.conditioning import digest_of  # takes seconds to import, for latent models alone

    return digest_of(entries)


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        found = parse_yaml(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a readable plan: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not isinstance(found.get("runs"), dict):
        raise ValueError(f"{path}: expected the plan of a comparison, found something else")
    return found
