"""What the folder of a sampling run holds: where its images lie, and their prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CONFIG_NAME = "sampling_config.yaml"
IMAGES_IN = "images_in"  # its entry: the folder of the images within the run's, null where none are kept
PROMPTS_NAME, LABELS_NAME = "prompts.txt", "labels.txt"  # a line per image, in the order of their numbers
STATISTICS_NAME = "statistics.npz"
SUFFIXES = (".png", ".jpg", ".jpeg")  # what torch-fidelity takes for images
# Runs of older versions and of the original scripts have no entry; these tell them by their layout.
RUN_FOLDERS = ("img", "samples")
MARKS = (CONFIG_NAME, "sampling_config.yml", "run.log")
COMPARISON_NAME = "comparison.yaml"


def images_folder(path: Path) -> Path:
    """The folder in which the images of `path` lie: a run's own says so; `path` itself where it is no run's folder.

    Raises ValueError where a folder holds pictures, but no images to judge: a run that kept none, a comparison.
    """
    config = read_config(path)
    if IMAGES_IN in config:
        return _declared(path, config[IMAGES_IN])
    if (path / COMPARISON_NAME).is_file():
        raise ValueError(f"{path}: expected images, found a comparison, whose pictures show tables and rows of them")
    on_top = [file.name for file in image_files(path)]
    grids = bool(on_top) and all(name.startswith("grid-") for name in on_top)
    marked = any((path / name).is_file() for name in MARKS)
    if marked or grids or not on_top:
        for name in RUN_FOLDERS:
            if any(image_files(path / name)):
                return path / name
    if marked and grids:
        raise ValueError(f"{path}: expected images, found a run that kept its grid alone")
    return path


def read_config(path: Path) -> dict[str, Any]:
    """The description that a run's folder keeps; empty where there is none. Raises ValueError for an unreadable one."""
    file = path / CONFIG_NAME
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: expected the description of a run, found no readable one: {reason}") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected the description of a run, found {type(found).__name__}")
    return found


def image_files(folder: Path) -> Iterator[Path]:
    """The files of a folder that are named as images; none where it is no folder."""
    if folder.is_dir():
        yield from (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())


def read_run_prompts(folder: Path) -> tuple[str, ...] | None:
    """The prompts of a run's images as `write_lines` wrote them, empty ones and white space too; None without a file.

    Raises ValueError naming a file that is not UTF-8.
    """
    path = folder / PROMPTS_NAME
    if not path.is_file():
        return None
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x}") from error
    return tuple(line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines))


def is_run(folder: Path) -> bool:
    """Whether one of the sampling scripts has written the folder."""
    return (folder / CONFIG_NAME).is_file()


def _declared(path: Path, inner: object) -> Path:
    """The folder that a run names."""
    if inner is None:
        there = path / STATISTICS_NAME
        instead = f"; {there} serves as a reference" if there.is_file() else ""
        raise ValueError(f"{path}: expected images, found a run that kept none{instead}")
    if not isinstance(inner, str) or Path(inner).is_absolute() or ".." in Path(inner).parts:
        raise ValueError(f"{path / CONFIG_NAME}: {IMAGES_IN}: expected a folder within the run's, found {inner!r}")
    if not any(image_files(path / inner)):
        raise ValueError(f"{path / inner}: expected the images of the run, found none; is the run finished?")
    return path / inner
