"""The processes of compare_methods.py: side by side, one that fails, interruptions."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comparing import rows_of
from running import ENVIRONMENT, Result, call, command, refused

from qdiff.cli.compare import jobs as comparison_jobs

COMPARE = "compare_methods"
SHORT = ("--timesteps", 4, "--cali_st", 2, "--cali_n", 2, "--n_samples", 4)


@pytest.mark.long
def test_a_part_that_fails(tiny, tmp_path):
    """The others go on; what is wrong is said."""
    (tmp_path / "out" / "nearest_w4a8.safetensors").mkdir(parents=True)
    result = call(COMPARE, *tiny.model, *SHORT, "--methods", "nearest", "gptq", "--outdir", "out", "--jobs", 2)
    assert result.code == 2
    *_, last = result.complaints
    assert "1 of 2 runs failed: nearest_w4a8" in last and "no such checkpoint" in last
    assert [row["label"] for row in rows_of(tmp_path / "out")] == ["float", "gptq"]
    assert result.bars[-1] == "comparison" and "gptq images" not in result.bars
    assert "gptq_w4a8" in (tmp_path / "out" / "gptq_w4a8" / "run.log").read_text()


def processes(outdir):
    """Command lines of running processes that name a folder."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            text = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        found += [text] * (str(outdir) in text)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks at processes in /proc")
@pytest.mark.long
def test_an_interrupted_comparison(tiny, tmp_path):
    """Ctrl-C ends the parts, whose bars were shown; what is done is there, and known to be of this plan."""
    flags = (*tiny.model, *SHORT, "--methods", "q-diffusion:2000", "--outdir", tmp_path / "out")
    started = subprocess.Popen(command(COMPARE, *flags), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    record = tmp_path / "out" / "q-diffusion-2000_w4a8.unfinished"
    while not record.is_dir() and time.monotonic() < deadline and started.poll() is None:
        time.sleep(0.05)
    assert len(processes(tmp_path / "out")) == 2
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=120)[1]
    assert {"calibration data", "float images"} <= set(Result(0, "", said).bars)
    assert started.returncode == 130 and "interrupted: the same command goes on" in said and "Traceback" not in said
    assert processes(tmp_path / "out") == []
    assert (tmp_path / "out" / "float" / "result.json").is_file() and record.is_dir()
    changed = "--set", "reconstruct.iterations=3"
    refused(call(COMPARE, *flags, *changed), "iterations: 2000 there, 3 here")


def jobs_of(seconds, jobs, monkeypatch, largest=0, free=None, fails=()):
    """(most processes at once, slugs in the order in which they ended, jobs) of processes that sleep."""
    alive, most, ended = [], [0], []

    class Watched(comparison_jobs.Job):
        def __init__(self, slug, *args, **kwargs):
            super().__init__(slug, *args, **kwargs)
            alive.append(slug)
            most[0] = max(most[0], len(alive))

    def command_of(slug):
        line = f"import sys, time; time.sleep({seconds[slug]}); print('broken {slug}', file=sys.stderr)"
        return [sys.executable, "-S", "-c", f"{line}; sys.exit({3 if slug in fails else 0})"]

    def done(job):
        alive.remove(job.slug)
        ended.append(job)

    monkeypatch.setattr(comparison_jobs, "Job", Watched)
    monkeypatch.setattr(comparison_jobs, "free_memory", lambda: free)
    comparison_jobs.run_jobs(list(seconds), command_of, jobs, lambda: largest, done)
    return most[0], [job.slug for job in ended], ended


def test_jobs_side_by_side(monkeypatch):
    seconds = {"a": 1.5, "b": 0.1, "c": 0.1}
    assert jobs_of(seconds, 2, monkeypatch)[:2] == (2, ["b", "c", "a"])


@pytest.mark.parametrize(("free", "most"), [(1190, 1), (1210, 2)])
def test_jobs_wait_for_memory(monkeypatch, free, most):
    """A further one needs the largest peak so far and a fifth; the first one starts in any case."""
    assert jobs_of({"a": 0.5, "b": 0.1}, 2, monkeypatch, largest=1000, free=free)[0] == most


def test_a_job_that_fails(monkeypatch):
    failed = jobs_of({"a": 0, "b": 0}, 1, monkeypatch, fails=("a",))[2]
    assert [(job.slug, job.process.returncode, job.complaint) for job in failed] == [
        ("a", 3, "broken a"),
        ("b", 0, "broken b"),
    ]


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_interruption_ends_all_jobs(monkeypatch, stubborn):
    """Those too that do not listen."""
    monkeypatch.setattr(comparison_jobs, "GRACE", 0.5 if stubborn else 30)  # a busy machine may take its time
    ignores = "signal.signal(signal.SIGINT, signal.SIG_IGN); " * stubborn
    code = f"import signal, sys, time; {ignores}print('ready', file=sys.stderr, flush=True); time.sleep(60)"
    started = []

    class Watched(comparison_jobs.Job):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

        def finished(self):
            if all(b"ready" in job._tail for job in started):
                raise KeyboardInterrupt
            return super().finished()

    monkeypatch.setattr(comparison_jobs, "Job", Watched)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        comparison_jobs.run_jobs(["a", "b"], lambda slug: [sys.executable, "-S", "-c", code], 2, lambda: 0, None)
    assert len(started) == 2 and time.monotonic() - begun < 50
    expected = -signal.SIGKILL if stubborn else -signal.SIGINT
    assert {job.process.returncode for job in started} <= {expected, 1}


def test_free_memory(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  10 kB\nMemFree:  1 kB\nMemAvailable:    7 kB\n")
    assert comparison_jobs.free_memory(str(tmp_path / "meminfo")) == 7 * 1024
    assert comparison_jobs.free_memory(str(tmp_path / "none")) is None


@pytest.mark.parametrize(("given", "jobs", "threads"), [(None, 1, None), (None, 2, "2"), ("3", 2, "3")])
def test_threads_of_jobs(monkeypatch, given, jobs, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(5), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert comparison_jobs.child_environment(jobs).get("OMP_NUM_THREADS") == threads


def test_processes_of_torchrun_meet_anew(monkeypatch):
    """Each at a port of its own, not in torchrun's store."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    found = [comparison_jobs.child_environment(1, number) for number in range(3)]
    assert [each["MASTER_PORT"] for each in found] == ["29501", "29502", "29503"]
    assert {each["TORCHELASTIC_USE_AGENT_STORE"] for each in found} == {"False"}
