"""Prompts to classes, and the share of images that show what was asked for."""

import pytest
import torch

from qdiff.evaluation.features import CLASSES
from qdiff.evaluation.prompts import class_of_prompt, named_classes, prompt_accuracy

MEANING = {
    "airplane": 0, "plane": 0, "automobile": 1, "car": 1, "bird": 2, "cat": 3, "kitten": 3, "deer": 4,
    "dog": 5, "puppy": 5, "frog": 6, "horse": 7, "ship": 8, "boat": 8, "truck": 9, "lorry": 9,
}  # fmt: skip
TEMPLATES = ["a photo of a {}", "a picture of a {}", "an image of a {}", "a {}", "{}", "a small photo of a {}",
             "a photo of the {}", "a blurry photo of a {}"]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_caption_of_the_text_model_names_its_class(template):
    assert {word: class_of_prompt(template.format(word)) for word in MEANING} == MEANING


@pytest.mark.parametrize(
    ("prompt", "name"), [("A CAT!", "cat"), ("a cat and a kitten", "cat"), ("a red-car", "automobile")]
)
def test_case_and_punctuation_do_not_matter(prompt, name):
    assert CLASSES[class_of_prompt(prompt)] == name


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("", 0), ("a scar", 0), ("a catalogue", 0), ("a cat and a dog", 2), ("a bird, a plane, a ship", 3)],
)
def test_prompts_of_no_class_or_several_are_refused(prompt, count):
    with pytest.raises(ValueError, match=f"^prompt .*: expected one of the words airplane, .*; found {count} classes$"):
        class_of_prompt(prompt)


@pytest.mark.long
def test_real_images_show_what_their_labels_say(cifar_test):
    images, labels = cifar_test
    prompts = [f"a photo of a {CLASSES[label]}" for label in labels]
    named = named_classes(images)
    expected = (named == labels).double().mean().item()
    assert expected > 0.8
    assert prompt_accuracy(images, prompts) == pytest.approx(expected)
    wrong = [f"a {CLASSES[(label + 1) % 10]}" for label in labels]
    assert prompt_accuracy(images, wrong) < 0.1
    half = prompts[:100] + wrong[100:]
    assert prompt_accuracy(images, half) == pytest.approx(
        float((named[:100] == labels[:100]).double().mean()) / 2, abs=0.05
    )


def test_the_size_of_batches_does_not_matter(cifar_test):
    images = cifar_test[0][:20]
    assert torch.equal(named_classes(images, batch_size=7), named_classes(images, batch_size=20))


def test_every_image_needs_a_prompt(cifar_test):
    with pytest.raises(ValueError, match="expected a prompt for each of 3 images, found 2"):
        prompt_accuracy(cifar_test[0][:3], ["a cat", "a dog"])


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)])
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match="expected uint8"):
        prompt_accuracy(images, ["a cat", "a dog"])
