"""Calibrations that are killed and go on end with the uninterrupted run's checkpoint, byte for byte."""

import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qdiff.calibration import resume as records
from qdiff.calibration.calibrate import Progress, RunOptions, calibrate
from qdiff.calibration.resume import PLAN, Record
from qdiff.calibration.store import MemoryLimits
from qdiff.checkpoints.native import save_checkpoint
from qdiff.methods import MethodOptions, make_recipe
from qdiff.recipes.stages import GPTQ, ActivationRanges, CorrectBias, Reconstruct, WeightRanges

ONE_LEVEL = {"ch_mult": [1], "attn_resolutions": [8]}
SIZES = {"model_channels": 32, "channel_mult": [1], "attention_resolutions": [1]}
FEW = {"iterations": 2, "act_iterations": 2, "batch_size": 4, "weight_range": "minmax", "act_range": "minmax"}
OPTIONS = {
    "ddim": MethodOptions(4, 8, split=True, rounding_start="gptq", **FEW),
    "ldm": MethodOptions(4, 8, split=True, family="latent", **FEW),
}
CASES = [("quick", "ddim"), ("q-diffusion", "ldm")]
CASES += [pytest.param(*case, marks=pytest.mark.long) for case in (("quick", "ldm"), ("q-diffusion", "ddim"))]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def parts(make_network, adapter, states, make_latent, latent_adapter, latent_states):
    """(method, family) -> the arguments of `calibrate` up to the timesteps; every random choice there is, is made."""

    def make(method, family):
        recipe = make_recipe(method, OPTIONS[family])
        if method == "quick":
            stages = (replace(s, inputs="mixed", drop=0.5) if isinstance(s, Reconstruct) else s for s in recipe.stages)
            recipe = replace(recipe, stages=tuple(stages))
        if family == "ddim":
            return make_network(32, **ONE_LEVEL), adapter, recipe, states, 0
        network = make_latent("transformer", **SIZES)
        return network, latent_adapter, recipe, latent_states("transformer"), 0

    return make


@pytest.fixture(scope="module")
def uninterrupted(parts, timesteps, tmp_path_factory):
    """(method, family) -> (the calibration, the bytes of its checkpoint)."""
    made = {}

    def make(method, family):
        if (method, family) not in made:
            run = calibrate(*parts(method, family), timesteps)
            made[method, family] = run, checkpoint_of(run, tmp_path_factory.mktemp("whole") / "c.safetensors")
        return made[method, family]

    return make


def checkpoint_of(run, path):
    save_checkpoint(path, run.network, run.adapter, run.recipe, torch.arange(950, 0, -100), {"seed": run.seed})
    return path.read_bytes()


def pieces_of(run):
    """(stage, piece) of every piece of a calibration's record, in the order in which they are made."""
    single = (WeightRanges, ActivationRanges)
    return [
        (number, name)
        for number, stage in enumerate(run.recipe.stages)
        for name in ([""] if isinstance(stage, single) else run.units())
    ]


def without_seconds(reports):
    return [replace(report, seconds=0.0) for report in reports]


def kill_at(monkeypatch, moment, piece):
    """Die just before a piece is written, while it is, or just after."""
    save, write = Record.save, records.save_safetensors

    def dying_save(self, stage, unit, tensors, notes):
        if (stage, unit) == piece and moment == "before":
            raise Killed
        save(self, stage, unit, tensors, notes)
        if (stage, unit) == piece and moment == "after":
            raise Killed

    def dying_write(tensors, path, metadata):
        if moment == "while" and metadata["qdiff"].startswith(f'{{"stage": {piece[0]}, "unit": "{piece[1]}"'):
            (path.parent / f".{path.name}.half").write_bytes(b"half a file")
            raise Killed
        write(tensors, path, metadata)

    monkeypatch.setattr(Record, "save", dying_save)
    monkeypatch.setattr(records, "save_safetensors", dying_write)


class DyingProgress(Progress):
    """Ends everything in the middle of a unit's learning."""

    def __init__(self, unit, count=2):
        self.unit_name, self.left = unit, count

    def advance(self, amount=1, note=""):
        self.left -= note.startswith(f"{self.unit_name} loss")
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_run_killed_in_every_stage_ends_with_the_same_file(
    parts, uninterrupted, timesteps, tmp_path, monkeypatch, method, family
):
    whole, expected = uninterrupted(method, family)
    arguments, pieces = parts(method, family), pieces_of(whole)
    assert len({type(stage) for stage in whole.recipe.stages}) >= 3
    options = RunOptions(record=tmp_path / "record", plan={"seed": 0}, scratch=tmp_path)
    for number, stage in enumerate(whole.recipe.stages):
        names = [name for n, name in pieces if n == number]
        piece = (number, names[len(names) // 2])
        done = pieces.index(piece)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            moment = ("before", "while", "after")[number % 3]
            kill_at(patch, moment, piece)
            calibrate(*arguments, timesteps, options=options)
        assert len(Record(options.record, options.plan)) == done + (moment == "after")
        if isinstance(stage, Reconstruct):
            name = names[names.index(piece[1]) + 2]
            with pytest.raises(Killed):
                calibrate(*arguments, timesteps, DyingProgress(name), options=options)
            assert len(Record(options.record, options.plan)) == pieces.index((number, name))
        options = replace(options, memory=MemoryLimits(host=(None, 0, 10**6)[number % 3]))
    run = calibrate(*arguments, timesteps, options=options)
    assert checkpoint_of(run, tmp_path / "c.safetensors") == expected
    assert without_seconds(run.reports) == without_seconds(whole.reports)
    assert len(run.record) == len(pieces)  # it stays until the caller has saved the result
    run.record.remove()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.safetensors"]


@pytest.fixture(scope="module")
def finished(parts, timesteps, tmp_path_factory):
    """The record of a calibration that has come to its end."""
    folder = tmp_path_factory.mktemp("finished") / "record"
    calibrate(*parts("quick", "ddim"), timesteps, options=RunOptions(record=folder))
    return folder


def test_a_finished_record_gives_the_result_without_any_work(
    parts, uninterrupted, finished, timesteps, tmp_path, monkeypatch
):
    whole, expected = uninterrupted("quick", "ddim")
    options = RunOptions(record=shutil.copytree(finished, tmp_path / "record"))
    former = {path.name: path.read_bytes() for path in options.record.iterdir()}
    monkeypatch.setattr("qdiff.calibration.frontier.Frontier.__init__", None)
    run = calibrate(*parts("quick", "ddim"), timesteps, options=options)
    assert checkpoint_of(run, tmp_path / "c.safetensors") == expected
    assert {path.name: path.read_bytes() for path in options.record.iterdir()} == former
    assert len(former) == len(pieces_of(whole)) + 1 and PLAN in former


def test_pieces_that_were_lost_are_made_again(parts, uninterrupted, finished, timesteps, tmp_path):
    """Any of them: what comes later is as it was, whatever is made anew."""
    _, expected = uninterrupted("quick", "ddim")
    options = RunOptions(record=shutil.copytree(finished, tmp_path / "record"))
    for path in random.Random(0).sample(sorted(options.record.glob("*.safetensors")), 12):
        path.unlink()
    run = calibrate(*parts("quick", "ddim"), timesteps, options=options)
    assert checkpoint_of(run, tmp_path / "c.safetensors") == expected


def test_a_record_of_another_plan_is_refused_before_any_work(parts, timesteps, tmp_path):
    record = tmp_path / "record"
    Record(record, {"seed": 1})
    with pytest.raises(ValueError, match="of another plan: seed: 1 there, 0 here"):
        calibrate(*parts("quick", "ddim"), timesteps, options=RunOptions(record=record, plan={"seed": 0}))


@pytest.mark.long
def test_the_order_of_definition_goes_on_too(parts, make_network, timesteps, tmp_path):
    """Where units learn before others that the network runs first: in a network of two levels."""
    _, adapter, recipe, data, seed = parts("q-diffusion", "ddim")
    network = make_network(32)
    recipe = replace(recipe, compat=("definition_order", "train_mode"))
    stages = tuple(s for s in recipe.stages if not isinstance(s, (GPTQ, CorrectBias)))
    arguments = network, adapter, replace(recipe, stages=stages), data, seed, timesteps
    expected = checkpoint_of(calibrate(*arguments), tmp_path / "whole.safetensors")
    for unit in ("up.0.block.1", "up.1.attn.0"):
        with pytest.raises(Killed):
            calibrate(*arguments, DyingProgress(unit), options=RunOptions(record=tmp_path / "record"))
    run = calibrate(*arguments, options=RunOptions(record=tmp_path / "record"))
    assert checkpoint_of(run, tmp_path / "c.safetensors") == expected


# SIGKILL. One process loads everything once and lets a child calibrate, again and again, each of which it kills.

KILLING = """
import os, pickle, random, signal, sys, time
from pathlib import Path
import torch
from qdiff.calibration.calibrate import RunOptions, calibrate
from qdiff.calibration.store import MemoryLimits
from qdiff.checkpoints.native import save_checkpoint

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
arguments = pickle.loads((folder / "arguments").read_bytes())

def child(name, options=None):
    pid = os.fork()
    if pid:
        return pid
    try:
        run = calibrate(*arguments, options=options)
        save_checkpoint(folder / name, run.network, run.adapter, run.recipe, arguments[-1], {})
        os._exit(0)
    finally:
        os._exit(1)

started = time.monotonic()
assert os.waitpid(child("whole.safetensors"), 0)[1] == 0
whole, draw = time.monotonic() - started, random.Random(int(sys.argv[3]))
record = folder / "record"
options = RunOptions(record=record, memory=MemoryLimits(host=0), scratch=folder / "scratch")
for _ in range(kills):
    pid = child("resumed.safetensors", options)
    time.sleep(draw.uniform(0.02, 0.3) * whole)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    print(os.WIFSIGNALED(status), len(list(record.glob("[0-9]*.safetensors"))), flush=True)
print(os.waitpid(child("resumed.safetensors", options), 0)[1] == 0)
"""


@pytest.mark.long
@pytest.mark.parametrize(("method", "family"), [("quick", "ddim"), ("q-diffusion", "ldm")])
def test_a_process_killed_at_random_moments_ends_with_the_same_file(parts, timesteps, tmp_path, method, family):
    (tmp_path / "arguments").write_bytes(pickle.dumps((*parts(method, family), timesteps)))
    command = [sys.executable, "-c", KILLING, tmp_path, "5", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[3])
    assert run.returncode == 0, run.stderr
    *killed, last = [line.split() for line in run.stdout.splitlines()]
    counts = [int(count) for _, count in killed]
    assert last == ["True"] and len(killed) == 5 and sum(flag == "True" for flag, _ in killed) >= 3
    assert counts == sorted(counts) and counts[-1] > 0
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert list((tmp_path / "scratch").iterdir()) == []
