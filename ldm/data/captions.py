"""Captions of CIFAR-10 images (models/README.md): a template filled with a word for the image's class."""

import numpy as np

TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a {}",
    "{}",
    "a small photo of a {}",
    "a photo of the {}",
    "a blurry photo of a {}",
)
# In the order of the class labels.
WORDS = (
    ("airplane", "plane"),
    ("automobile", "car"),
    ("bird",),
    ("cat", "kitten"),
    ("deer",),
    ("dog", "puppy"),
    ("frog",),
    ("horse",),
    ("ship", "boat"),
    ("truck", "lorry"),
)


def caption(label: int, draws: np.random.Generator) -> str:
    """A caption for an image of class `label`, 0 to 9: each template and each word of the class equally likely."""
    template = TEMPLATES[draws.integers(len(TEMPLATES))]
    words = WORDS[label]
    return template.format(words[draws.integers(len(words))])
