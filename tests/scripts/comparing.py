"""compare_methods.py with its parts in this process, one after the other: the same work without the starts."""

import json
from types import SimpleNamespace

import compare_methods


def run_jobs(todo, command, jobs, largest, done, first=0):
    """In place of comparison_jobs.run_jobs."""
    for slug in todo:
        compare_methods.main(command(slug)[2:])
        done(SimpleNamespace(slug=slug, process=SimpleNamespace(returncode=0)))


def rows_of(folder):
    """The rows of a comparison's results."""
    return json.loads((folder / "results.json").read_text())["rows"]
