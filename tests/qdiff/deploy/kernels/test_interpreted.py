"""The kernels, interpreted on the CPU: the files of cases in a process of their own, since Triton asks at import; and
compiled where there is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
VERSIONS = [tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, np)]
interpreted = pytest.mark.skipif(
    VERSIONS[0] < (3, 4) and VERSIONS[1] >= (2, 4), reason="this Triton's interpreter takes NumPy below 2.4"
)
CASES = sorted(Path(__file__).parent.glob("*_cases.py"))


def run(files, *more, **environment):
    options = ["-q", *more, "--import-mode=importlib", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


@interpreted
@pytest.mark.long
def test_long_cases_on_the_cpu():
    run(CASES, "-m", "long", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@interpreted
def test_on_the_cpu():
    """All in one process: each takes seconds to start."""
    assert len(CASES) == 4
    run(CASES, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_on_a_gpu(file, tmp_path):
    run([file], "-m", "long or not long", TRITON_INTERPRET="0", QDIFF_CACHE=str(tmp_path))
