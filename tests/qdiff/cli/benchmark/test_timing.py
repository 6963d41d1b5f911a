"""The benchmarks' clock."""

import time

import pytest
import torch

from qdiff.cli.benchmark.timing import in_turn


def test_a_timed_call_follows_others_of_the_same_network():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in ("one", "other")}
    assert in_turn(runs, 2, torch.device("cpu")).keys() == runs.keys()
    assert calls == 2 * (3 * ["one"] + 3 * ["other"])


def test_milliseconds_are_of_the_last_call_alone(monkeypatch):
    """By a clock that runs while the networks do: 5 s in each first call, 1 s in the others."""
    now, seen = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run():
        now[0] += 5.0 if len(seen) % 3 == 0 else 1.0
        seen.append(now[0])

    assert in_turn({"it": run}, 4, torch.device("cpu")) == {"it": pytest.approx(1000.0)}
