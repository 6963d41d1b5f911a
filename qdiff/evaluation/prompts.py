"""Whether images of the bundled text model show what was asked for, as the bundled CIFAR-10 classifier sees them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from qdiff.evaluation.features import CLASSES, Cifar10Features, require_cifar_images

# Words of the text model's captions for the classes (models/README.md).
WORDS = {
    **{name: name for name in CLASSES},
    "plane": "airplane",
    "car": "automobile",
    "kitten": "cat",
    "puppy": "dog",
    "boat": "ship",
    "lorry": "truck",
}


def class_of_prompt(prompt: str) -> int:
    """Index into CLASSES of the one class that a prompt names. Raises ValueError where it names none or several."""
    found = {WORDS[word] for word in re.findall(r"[a-z]+", prompt.lower()) if word in WORDS}
    if len(found) != 1:
        known = ", ".join(WORDS)
        raise ValueError(f"prompt {prompt!r}: expected one of the words {known}; found {len(found)} classes")
    return CLASSES.index(found.pop())


@torch.no_grad()
def named_classes(images: Tensor, batch_size: int = 250, path: Path | None = None) -> Tensor:
    """images: uint8 [N, 3, 32, 32]. Returns [N] long, the class that the classifier names for each."""
    require_cifar_images(images)
    network = Cifar10Features.load(path)
    return torch.cat([network(batch / 127.5 - 1)[1].argmax(1) for batch in images.split(batch_size)])


def prompt_accuracy(images: Tensor, prompts: list[str]) -> float:
    """The share of images, uint8 [N, 3, 32, 32], in which the classifier names the class of their prompt."""
    wanted = torch.tensor([class_of_prompt(prompt) for prompt in prompts])
    if len(wanted) != len(images):
        raise ValueError(f"expected a prompt for each of {len(images)} images, found {len(wanted)}")
    return float((named_classes(images) == wanted).double().mean())
