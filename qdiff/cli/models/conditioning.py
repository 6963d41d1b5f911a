"""What images are asked for: prompts and labels from flags and files, and what the network sees of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import category

import torch
from omegaconf import DictConfig
from torch import Tensor

from ldm.pipeline import Conditioning
from qdiff.cli.runs.sampling import FIRST_CALIBRATION_IMAGE
from qdiff.evaluation.runs import PROMPTS_NAME, is_run, read_run_prompts

if TYPE_CHECKING:  # Lightning takes seconds to import, and scripts without a latent model have no use for it
    from ldm.models.diffusion.models import LatentDiffusion

Entry = str | int  # what an image is asked for: a prompt or a label
UNCONDITIONAL = "__is_unconditional__"


def is_conditional(config: DictConfig) -> bool:
    """Whether the model of a configuration takes prompts or labels."""
    return config.model.params.get("cond_stage_config", UNCONDITIONAL) != UNCONDITIONAL


def number_of_classes(config: DictConfig) -> int | None:
    """Labels that a class-conditional model knows; None for other models."""
    stage = config.model.params.get("cond_stage_config", UNCONDITIONAL)
    if stage == UNCONDITIONAL or not str(stage.get("target", "")).endswith(".ClassEmbedder"):
        return None
    return int(stage.get("params", {}).get("n_classes", 1000))


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


def check_prompt(prompt: str, where: str) -> str:
    """The prompt. Raises ValueError that begins with `where` for control characters, line breaks among them."""
    strange = next((char for char in prompt if category(char) in ("Cc", "Cs", "Zl", "Zp") and char != "\t"), None)
    if strange is not None:
        raise ValueError(f"{where}: expected text, found the control character U+{ord(strange):04X}")
    return prompt


def class_labels(args: argparse.Namespace, config: DictConfig, scale: float) -> tuple[list[int], int]:
    """(labels to sample, the label of no class) of a class-conditional model. Raises ValueError naming the flag."""
    count = number_of_classes(config)
    nothing = count - 1 if args.uncond_class is None else args.uncond_class
    if not -1 <= nothing < count:
        raise ValueError(f"--uncond_class {nothing}: expected a label up to {count - 1}, or -1")
    if nothing == -1 and scale != 1:
        raise ValueError(f"--scale {scale:g}: guidance needs a label of no class, but --uncond_class is -1")
    if args.classes is None:
        return [label for label in range(count) if label != nothing], nothing
    labels: list[int] = []
    for text in args.classes:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if found is None:
            raise ValueError(f"--classes {text}: expected a label or a range such as 0-9")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < count:
            raise ValueError(f"--classes {text}: expected labels from 0 to {count - 1}, the smaller one first")
        labels += range(first, last + 1)
    return labels, nothing


def digest_of(entries: Sequence[Entry]) -> dict | None:
    """A long list in a few words: its length, its first entries, and a hash of all."""
    if not entries:
        return None
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return {"count": len(entries), "first": list(entries[:4]), "sha256": digest}


def asked_of_calibration(args: argparse.Namespace, config: DictConfig) -> tuple[tuple[Entry, ...], Entry, float]:
    """(prompts or labels that calibration samples take in turn, the one of nothing, guidance scale) of the flags.

    The scale is by default that of the sampling scripts. Raises ValueError naming the flag at fault.
    """
    if number_of_classes(config) is not None:
        _refuse(args, ("prompt", "from_file"), "the model takes labels, not prompts")
        scale = 1.0 if args.scale is None else args.scale
        labels, nothing = class_labels(args, config, scale)
        return tuple(labels), nothing, scale
    _refuse(args, ("classes", "uncond_class"), "the model is not class-conditional")
    if not is_conditional(config):
        _refuse(args, ("prompt", "from_file", "scale"), "the model is unconditional")
        return (), -1, 1.0
    if (args.prompt is None) == (args.from_file is None):
        raise ValueError("--prompt, --from-file: the model takes prompts; give one of them")
    if args.from_file is None:
        prompts = [check_prompt(args.prompt, "--prompt")]
    else:
        prompts = read_prompts(args.from_file, "--from-file")
    return tuple(prompts), "", 7.5 if args.scale is None else args.scale


def _refuse(args: argparse.Namespace, flags: Sequence[str], reason: str) -> None:
    for flag in flags:
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_file', '-file')}: {reason}")


@dataclass(frozen=True)
class Conditioner:
    """Turns what each image is asked for into what the network sees."""

    model: LatentDiffusion
    entry: Callable[[int], Entry]  # image index -> prompt or label
    nothing: Entry  # the empty prompt, or the label of no class
    guided: bool

    @torch.no_grad()
    def __call__(self, batch: Sequence[int]) -> Conditioning:
        asked = [self.entry(index) for index in batch]
        return Conditioning(self._encode(asked), self._encode([self.nothing] * len(asked)) if self.guided else None)

    def _encode(self, asked: list[Entry]) -> Tensor:
        if isinstance(asked[0], str):
            return self.model.get_learned_conditioning(asked)
        device = next(self.model.parameters()).device
        return self.model.get_learned_conditioning(torch.tensor(asked, device=device))


def calibration_conditioner(
    model: LatentDiffusion, entries: Sequence[Entry], nothing: Entry, scale: float
) -> Conditioner | None:
    """The conditioning of calibration images: the entries in turn."""
    if not entries:
        return None
    return Conditioner(model, lambda i: entries[(i - FIRST_CALIBRATION_IMAGE) % len(entries)], nothing, scale != 1)
