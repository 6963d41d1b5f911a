"""Two processes on a CPU: what they tell one another, calibrations that they share, and one that fails."""

import argparse
import importlib
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from qdiff.cli.team import start_team
from qdiff.utils.fabric_team import without_torchmetrics
from qdiff.utils.team import Team

WORKER = Path(__file__).with_name("team_worker.py")
CPU = torch.device("cpu")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(*args):
    """A team of two processes that ends within a minute."""
    command = [sys.executable, str(WORKER), *map(str, args), "--devices", "2"]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def worker():
    """The worker's functions."""
    return argparse.Namespace(**runpy.run_path(str(WORKER), run_name="team_worker"))


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the team works."""
    return tmp_path_factory.mktemp("team")


@pytest.fixture(scope="module")
def ended(folder):
    """The team, which worked until process 1 failed."""
    return launch(folder)


@pytest.fixture(scope="module")
def results(ended, folder, worker):
    """The results of both processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Box, "__module__", "__main__")  # as the processes, which it was the main module of, say
        with torch.serialization.safe_globals([worker.Box]):
            return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_same(found, expected):
    """Two networks' states, bit for bit."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_values_reach_all_processes(results, worker):
    for result in results:
        found = result["exchange"]["from 0"]
        assert found["name"] == "process 0"
        *plain, scalar, empty, strided = found["values"]
        assert [value.dtype for value in plain] == list(worker.DTYPES)
        assert all(value.tolist() == [0, 1, 0] for value in plain)
        assert scalar.shape == () and scalar == 0 and empty.shape == (0, 4)
        assert torch.equal(strided, torch.arange(6).view(2, 3).T)
        first, (second, nothing) = result["exchange"]["from 1"].content
        assert torch.equal(first, torch.ones(2, 3)) and first is second and nothing is None


def test_sums_are_over_all_processes(results):
    for result in results:
        square, scalar, ones = result["exchange"]["sums"]
        assert torch.equal(square, torch.full((2, 2), 3.0)) and torch.equal(ones, torch.full((3,), 2.0))
        assert scalar == 3 and scalar.dtype == torch.float64


def test_work_is_shared_and_its_results_come_in_order(results):
    shares = zip(*(result["exchange"]["shares"] for result in results), strict=True)
    for share, count in zip(shares, (5, 1), strict=True):
        assert torch.cat(share).sort().values.tolist() == list(range(count))
    assert all(result["exchange"]["gathered"] == [0, 10, 20, 30, 40] for result in results)
    assert all(result["exchange"]["threads"] == 1 for result in results)


@pytest.mark.parametrize("name", ["q-diffusion", "q-diffusion, one sample", "quick", "mixed"])
def test_a_team_calibrates_like_one_process(results, worker, one_thread, name):
    """In float64: the same codes, and scales to 1e-9, since sums over batches are in another order."""
    expected, errors = worker.calibrated(worker.recipes()[name], torch.float64, Team())
    (state, found), (other, _) = (result[name] for result in results)
    assert_same(other, state)
    assert state.keys() == expected.keys() and any(key.endswith(".codes") for key in state)
    for key, tensor in expected.items():
        if key.endswith("codes"):
            assert torch.equal(state[key], tensor), key
        else:
            torch.testing.assert_close(state[key], tensor, rtol=1e-9, atol=1e-9)
    assert found == pytest.approx(errors, rel=1e-9)


def test_in_float32_units_end_at_the_same_error(results, worker, one_thread):
    _, errors = worker.calibrated(worker.recipes()["quick"], torch.float32, Team())
    (state, found), (other, _) = (result["float32"] for result in results)
    assert_same(other, state)
    assert found == pytest.approx(errors, rel=0.05)  # sums in another order tip codes near ties: 1.2 % with AVX2


def test_a_team_that_was_interrupted_goes_on_to_the_same_result(results, folder):
    pieces = [result["pieces after 4"] for result in results], [result["pieces after 12"] for result in results]
    assert pieces[0][0] == 5 and pieces[1][0] > 12  # the leading process writes: ranges and units
    assert pieces[0][1] == pieces[1][1] == 0 and not (folder / "record1").exists()
    for result in results:
        assert_same(result["resumed"][0], results[0]["q-diffusion"][0])


def test_where_a_process_fails_all_end_and_one_says_why(ended):
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.split("\n") == ["", f"{WORKER.name}: error: --nothing: as it should be", ""]


@pytest.mark.long
def test_where_a_process_vanishes_all_end_and_one_says_so():
    done = launch()
    assert done.returncode == 1 and done.stdout == ""
    wanted = f"{WORKER.name}: error: process 1 has ended unexpectedly with exit code -9"
    assert done.stderr.split("\n") == ["", wanted, ""]


def flags(devices=1, num_nodes=1, dry_run=False):
    return argparse.Namespace(devices=devices, num_nodes=num_nodes, dry_run=dry_run)


def test_one_process_is_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)  # importing it fails
    for args in (flags(), flags(devices=2, dry_run=True)):
        with start_team(args, CPU) as team:
            assert type(team) is Team and team.device is None


def test_flags_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="--device cuda:1: names one device, --devices 2 on 1 machines ask for 2"):
        start_team(flags(devices=2), torch.device("cuda:1"))
    with pytest.raises(ValueError, match="--num_nodes 2: start it by torchrun or srun, or set MASTER_ADDR"):
        start_team(flags(num_nodes=2), CPU)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--devices 1 --num_nodes 1: expected 2 processes in all"):
        start_team(flags(), CPU)


def test_torchmetrics_is_out_of_sight_only_while_fabric_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "torchmetrics", raising=False)
    with without_torchmetrics(), pytest.raises(ImportError):
        importlib.import_module("torchmetrics")
    assert "torchmetrics" not in sys.modules
    loaded = types.ModuleType("torchmetrics")
    monkeypatch.setitem(sys.modules, "torchmetrics", loaded)
    with without_torchmetrics():
        assert sys.modules["torchmetrics"] is loaded
    assert sys.modules["torchmetrics"] is loaded
