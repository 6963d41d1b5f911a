"""Nothing that tests measure is kept in, or taken from, the user's cache."""

import contextlib
import fnmatch
import os
import resource
import shutil
import tempfile

import pytest


def pytest_configure(config):
    config.cache_of_tests = os.environ["QDIFF_CACHE"] = tempfile.mkdtemp(prefix="qdiff-tests-")


def pytest_itemcollected(item):
    """@pytest.mark.cases(patterns): of a test's parameter sets, the ids that `make test` runs; the others are long."""
    mark = item.get_closest_marker("cases")
    if mark is not None and not any(fnmatch.fnmatchcase(item.callspec.id, pattern) for pattern in mark.args):
        item.add_marker(pytest.mark.long)


@pytest.hookimpl(tryfirst=True)  # before -m takes any out
def pytest_collection_modifyitems(config, items):
    """The tests of the command lines come last: for the rest of the session they hide GPUs and take one thread.

    A pattern that stands for no case would leave a test out without a word.
    """
    items.sort(key=lambda item: "cli" in item.path.parts)
    if any("::" in arg for arg in config.args):
        return
    ids = {}
    for item in items:
        if (mark := item.get_closest_marker("cases")) is not None:
            ids.setdefault((item.location[0], item.originalname), (mark, []))[1].append(item.callspec.id)
    for (file, name), (mark, found) in ids.items():
        for pattern in mark.args:
            if not fnmatch.filter(found, pattern):
                raise pytest.UsageError(f"{file}::{name}: no case is called {pattern}, there are {', '.join(found)}")


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
