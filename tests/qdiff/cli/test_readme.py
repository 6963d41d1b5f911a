"""The README's own lines: every command parses to a plan, and the lines of qdiff run, at small settings."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from latents import BUNDLED

from qdiff.cli.main import resolve, run

REPOSITORY = Path(__file__).parents[3]
SMALL = {
    "quantize": ("--timesteps", "2", "--cali_n", "2", "--cali_st", "2", "--method", "nearest"),
    "sample": ("--steps", "2", "--images", "2", "--batch_size", "2", "-e", "0"),
    "export": (),
    "evaluate": ("--bootstrap", "0"),
}


def lines(page):
    """The lines of a page's code blocks, continued ones joined, variables that a line before has set replaced."""
    text = (REPOSITORY / page).read_text(encoding="utf8")
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    found, variables = [], {"N": "1"}  # $N counts the rounds of a loop
    for line in blocks.replace("\\\n", " ").splitlines():
        if assigned := re.fullmatch(r"([A-Z]+)=[\"']?(.*?)[\"']?", line.strip()):
            variables[assigned[1]] = assigned[2]
            continue
        line = re.sub(r"\$([A-Z]+)", lambda name: variables.get(name[1], name[0]), line)
        if line.strip().startswith(("python ", "time python ", "qdiff ")):
            found.append(shlex.split(line.strip().removeprefix("time "), comments=True))
    return found


QDIFF = [line[1:] for line in lines("README.md") if line[0] == "qdiff"]
PAGES = ["README.md", *sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md"))]
SCRIPTS = [line[1:] for page in PAGES for line in lines(page) if line[0] == "python" and line[1].startswith("scripts/")]


def test_the_pages_hold_lines():
    assert len(QDIFF) >= 7 and len(SCRIPTS) >= 50
    assert len((REPOSITORY / "README.md").read_text(encoding="utf8").splitlines()) <= 120


@pytest.mark.parametrize("line", SCRIPTS, ids=lambda line: line[0].split("/")[-1])
def test_every_flag_of_a_script_is_known(line, monkeypatch, capsys):
    """Its parser takes the line; --help is asked for last, so that nothing is carried out."""
    script, *flags = line
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    import runpy

    module = sys.modules[runpy.run_path(str(REPOSITORY / script))["main"].__module__]
    flags = [re.sub(r"^<.*>$", "placeholder", flag) for flag in flags]
    module.parse_args(flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the README's relative paths mean the repository's."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("models", "configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def test_the_lines_of_qdiff_run(folder, monkeypatch):
    """In their order, each with what the one before has written; the long ones are resolved only."""
    monkeypatch.chdir(folder)
    assert BUNDLED.is_dir()
    for line in QDIFF:
        expanded = [str(p) for word in line for p in (sorted(folder.glob(word)) if "*" in word else [word])]
        name = line[0]
        if name not in SMALL:
            assert resolve(expanded)[1]
            continue
        monkeypatch.setattr(sys, "argv", ["qdiff"])
        run([*_without(expanded, SMALL[name][::2]), *SMALL[name]])
    assert (folder / "outputs" / "ldm.onnx").is_file()


def _without(words, flags):
    """Words without these flags and their values."""
    kept, rest = [], iter(words)
    for word in rest:
        if word in flags:
            next(rest)
        else:
            kept.append(word)
    return kept


def test_the_lines_of_python_run(folder, monkeypatch):
    """Those of the README, on fewer states and images."""
    monkeypatch.chdir(folder)
    text = (REPOSITORY / "README.md").read_text(encoding="utf8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for given, small in (("64", "2"), ("steps=20", "steps=2"), ('"quick"', '"nearest", selector_steps=2'), ("16", "2")):
        block = block.replace(given, small)
    found = {}
    exec(block, found)  # noqa: S102
    assert found["images"].shape == (2, 3, 32, 32)
