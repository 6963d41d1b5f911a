"""What images are asked for: prompts and labels from flags and files."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qdiff.evaluation.runs import PROMPTS_NAME, is_run, read_run_prompts
from qdiff.families.ldm.conditioning import check_prompt, is_conditional, number_of_classes
from qdiff.families.options import Entry


def read_prompts(path: Path, flag: str) -> list[str]:
    """The prompts of a file, outer white space removed; lines left empty at the end are ignored.

    Those that one of the sampling scripts has kept in its run's folder are taken as they are, empty ones too.

    Raises FileNotFoundError, and ValueError naming the flag, the file and the line: not UTF-8, empty, or with control
    characters.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file")
    if path.name == PROMPTS_NAME and is_run(path.parent):
        return [check_prompt(prompt, f"{flag} {path}") for prompt in read_run_prompts(path.parent)]
    lines = path.read_bytes().rstrip().split(b"\n")
    prompts = []
    for number, line in enumerate(lines, start=1):
        where = f"{flag} {path}, line {number}"
        try:
            prompt = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: expected UTF-8 text, found byte 0x{line[error.start]:02x}") from error
        if not prompt:
            raise ValueError(f"{where}: expected a prompt, found an empty line")
        prompts.append(check_prompt(prompt, where))
    return prompts


def class_labels(args: argparse.Namespace, config: DictConfig) -> dict[str, Any]:
    """What --classes and --uncond_class ask for, as fields of `SamplingOptions`. Raises ValueError naming the flag."""
    count, labels = number_of_classes(config), []
    for text in args.classes or ():
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if found is None:
            raise ValueError(f"--classes {text}: expected a label or a range such as 0-9")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < count:
            raise ValueError(f"--classes {text}: expected labels from 0 to {count - 1}, the smaller one first")
        labels += range(first, last + 1)
    return {"labels": tuple(labels), "no_label": args.uncond_class}


def digest_of(entries: Sequence[Entry]) -> dict | None:
    """A long list in a few words: its length, its first entries, and a hash of all."""
    if not entries:
        return None
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return {"count": len(entries), "first": list(entries[:4]), "sha256": digest}


def asked_of_calibration(args: argparse.Namespace, config: DictConfig) -> dict[str, Any]:
    """Prompts or labels that calibration samples take in turn, and the guidance scale, of the flags, as fields of
    `SamplingOptions`. Raises ValueError naming the flag at fault.
    """
    if number_of_classes(config) is not None:
        _refuse(args, ("prompt", "from_file"), "the model takes labels, not prompts")
        return {"scale": args.scale, **class_labels(args, config)}
    _refuse(args, ("classes", "uncond_class"), "the model is not class-conditional")
    if not is_conditional(config):
        _refuse(args, ("prompt", "from_file", "scale"), "the model is unconditional")
        return {}
    if (args.prompt is None) == (args.from_file is None):
        raise ValueError("--prompt, --from-file: the model takes prompts; give one of them")
    if args.from_file is None:
        prompts = [check_prompt(args.prompt, "--prompt")]
    else:
        prompts = read_prompts(args.from_file, "--from-file")
    return {"prompts": tuple(prompts), "scale": args.scale}


def _refuse(args: argparse.Namespace, flags: Sequence[str], reason: str) -> None:
    for flag in flags:
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_file', '-file')}: {reason}")
