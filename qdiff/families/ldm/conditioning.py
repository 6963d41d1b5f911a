"""What images of latent models are asked for, and what the network sees of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unicodedata import category

import torch
from omegaconf import DictConfig
from torch import Tensor

from ldm.pipeline import Conditioning
from qdiff.families.options import Entry, SamplingOptions
from qdiff.utils.errors import FieldError

if TYPE_CHECKING:
    from ldm.models.diffusion.models import LatentDiffusion

UNCONDITIONAL = "__is_unconditional__"
TOKENS = 77  # of a prompt, where the configuration does not say
TEXT_SCALE = 7.5  # of guidance by prompts, where nothing is said, as in the original's txt2img.py


def is_conditional(config: DictConfig) -> bool:
    """Whether the model of a configuration takes prompts or labels."""
    return config.model.params.get("cond_stage_config", UNCONDITIONAL) != UNCONDITIONAL


def number_of_classes(config: DictConfig) -> int | None:
    """Labels that a class-conditional model knows; None for other models."""
    stage = config.model.params.get("cond_stage_config", UNCONDITIONAL)
    if stage == UNCONDITIONAL or not str(stage.get("target", "")).endswith(".ClassEmbedder"):
        return None
    return int(stage.get("params", {}).get("n_classes", 1000))


def kind_of(config: DictConfig) -> str:
    """ "text" for models that take prompts, else "latent"."""
    return "text" if is_conditional(config) and number_of_classes(config) is None else "latent"


def context_shape(config: DictConfig) -> tuple[int, ...]:
    """(tokens, width) of what a latent network is conditioned on, () for none."""
    width = config.model.params.unet_config.params.get("context_dim")
    if width is None:
        return ()
    prompts = kind_of(config) == "text"
    stage = config.model.params.get("cond_stage_config")
    options = (stage.get("params") or {}) if prompts else {}
    return options.get("max_length", options.get("max_seq_len", TOKENS)) if prompts else 1, width


def check_prompt(prompt: str, where: str) -> str:
    """The prompt. Raises ValueError that begins with `where` for control characters, line breaks among them."""
    strange = next((char for char in prompt if category(char) in ("Cc", "Cs", "Zl", "Zp") and char != "\t"), None)
    if strange is not None:
        raise ValueError(f"{where}: expected text, found the control character U+{ord(strange):04X}")
    return prompt


def asked_for(options: SamplingOptions, config: DictConfig) -> tuple[tuple[Entry, ...], Entry, float]:
    """(prompts or labels that images take in turn, the one of nothing, guidance scale) of a model.

    Raises FieldError naming an option that the model does not have, or that is out of range.
    """
    classes = number_of_classes(config)
    if classes is not None:
        _refuse(options, ("prompts",), "the model takes labels, not prompts")
        scale = 1.0 if options.scale is None else options.scale
        nothing = label_of_nothing(options.no_label, classes, scale)
        return _labels(options.labels, classes, nothing), nothing, scale
    _refuse(options, ("labels", "no_label"), "the model is not class-conditional")
    if not is_conditional(config):
        _refuse(options, ("prompts", "scale"), "the model is unconditional")
        return (), -1, 1.0
    if not options.prompts:
        raise FieldError("prompts", ": the model takes prompts, found none")
    for prompt in options.prompts:
        check_prompt(prompt, "prompts")
    return tuple(options.prompts), "", TEXT_SCALE if options.scale is None else options.scale


def label_of_nothing(given: int | None, classes: int, scale: float) -> int:
    """The label of no class, the last one by default. Raises FieldError where there is none such."""
    nothing = classes - 1 if given is None else given
    if not -1 <= nothing < classes:
        raise FieldError("no_label", f" {nothing}: expected a label up to {classes - 1}, or -1")
    if nothing == -1 and scale != 1:
        raise FieldError("scale", f" {scale:g}: guidance needs a label of no class, but {{}} is -1", "no_label")
    return nothing


def _labels(given: Sequence[int], classes: int, nothing: int) -> tuple[int, ...]:
    wrong = next((label for label in given if not 0 <= label < classes), None)
    if wrong is not None:
        raise FieldError("labels", f" {wrong}: expected labels from 0 to {classes - 1}")
    return tuple(given) or tuple(label for label in range(classes) if label != nothing)


def _refuse(options: SamplingOptions, fields: Sequence[str], reason: str) -> None:
    for field in fields:
        if getattr(options, field) not in (None, ()):
            raise FieldError(field, f": {reason}")


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
