"""CLIP score with a tiny CLIP model of random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from qdiff.evaluation.clip_score import ClipScore

TEXT = Path(__file__).parents[3] / "models" / "cifar10-sd" / "text"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-clip")
    tokens = json.loads((TEXT / "config.json").read_text())
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {key: tokens[key] for key in ("vocab_size", "max_position_embeddings", "eos_token_id", "bos_token_id")}
    vision = small | {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text | small, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TEXT / name, folder / name)
    return folder


PROMPTS = ["a photo of a cat", "a dog", "a blurry photo of a truck"]


@pytest.fixture(scope="module")
def clip(folder, cifar_test):
    """With cosines above 0: which sign random weights give depends on the version that draws them."""
    clip = ClipScore(folder)
    if clip(cifar_test[0][:3], PROMPTS).sum() == 0:
        clip.model.visual_projection.weight.data.neg_()
    return clip


@torch.no_grad()
def test_it_is_a_hundred_times_the_cosine(clip, cifar_test):
    images = cifar_test[0][:3]
    found = clip(images, PROMPTS)
    pixels = clip.processor(images=[x.permute(1, 2, 0).numpy() for x in images], return_tensors="pt")["pixel_values"]
    expected = []
    for i, prompt in enumerate(PROMPTS):
        tokens = clip.tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = clip.model(pixel_values=pixels[i : i + 1], input_ids=tokens)
        cosine = (out.image_embeds[0] @ out.text_embeds[0]).item()
        expected.append(100 * max(cosine, 0))
    assert found.tolist() == pytest.approx(expected, abs=1e-3) and found.dtype == torch.float64
    assert len(set(found.tolist())) > 1


def test_no_score_is_below_zero(clip, cifar_test):
    weight = clip.model.visual_projection.weight.data
    weight.neg_()
    assert clip(cifar_test[0][:3], PROMPTS).tolist() == [0, 0, 0]
    weight.neg_()


def test_long_prompts_are_cut(clip, cifar_test):
    assert clip(cifar_test[0][:1], ["a photo of a cat " * 40]).shape == (1,)


def test_other_folders_are_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="found no config.json"):
        ClipScore(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        ClipScore(tmp_path)
    assert "\n" not in str(caught.value)
