"""The documentation builds without a warning, where its extra is installed."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]


def pages(entry):
    """The pages of a navigation."""
    values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else [entry]
    return [entry] if isinstance(entry, str) else [page for value in values for page in pages(value)]


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf8"))
    assert sorted(pages(config["nav"])) == sorted(path.name for path in (REPOSITORY / "docs").glob("*.md"))


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "register_stage" in (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf8")
