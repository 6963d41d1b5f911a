"""What tests of evaluate.py share: folders of real images, and its numbers."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from running import call

TESTS = Path(__file__).parents[2]
sys.path.append(str(TESTS / "qdiff" / "evaluation"))
from random_inception import write_random_inception  # noqa: E402, F401

with np.load(TESTS / "fixtures" / "cifar10_test_200.npz") as saved:
    PIXELS, LABELS = saved["images"], saved["labels"]


def write_images(folder, pixels, names=None):
    """PNG files of [N, H, W, 3], named by number."""
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / (names[i] if names else f"{i}.png"))
    return folder


def noisy(pixels, strength=10):
    """The images with noise."""
    noise = np.random.default_rng(0).normal(0, strength, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


def evaluate(tmp_path, *flags):
    """(the result, metric -> value, the JSON file's content) of a run that succeeds."""
    result = call("evaluate", *flags, "--json", tmp_path / "found.json")
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "found.json").read_text())
    return result, {row["metric"]: row["value"] for row in content["scores"]}, content
