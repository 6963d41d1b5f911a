"""Nothing that tests measure is kept in, or taken from, the user's cache."""

import contextlib
import os
import resource
import shutil
import tempfile

import pytest


def pytest_configure(config):
    config.cache_of_tests = os.environ["QDIFF_CACHE"] = tempfile.mkdtemp(prefix="qdiff-tests-")


def pytest_unconfigure(config):
    shutil.rmtree(config.cache_of_tests, ignore_errors=True)


@contextlib.contextmanager
def _smaller_files(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def smaller_files():
    """(bytes): meanwhile this process may write no larger files. Stands for a disk that is full."""
    return _smaller_files


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache folder of the test's own, where nothing has been measured."""
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "own-cache"))
    return tmp_path / "own-cache"
