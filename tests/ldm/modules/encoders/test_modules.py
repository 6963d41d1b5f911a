import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.modules.encoders.modules import BERTEmbedder, ClassEmbedder, FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizers import PromptTokenizer

MODEL = Path(__file__).parents[4] / "models" / "cifar10-sd"
TEXT = MODEL / "text"
PREFIX = "cond_stage_model."
PROMPTS = ["a photo of a horse", "", "a small zebra", "a blurry photo of a dog " * 4]


def fails(kind, call, *mentions):
    """The call raises `kind` with one line that mentions everything asked."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [m for m in map(str, mentions) if m not in message] == [], message


@pytest.fixture(scope="module")
def state():
    """The bundled text encoder's weights under their published names, without the prefix."""
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        return {n.removeprefix(PREFIX): file.get_tensor(n).float() for n in file.keys() if n.startswith(PREFIX)}  # noqa: SIM118


@pytest.fixture
def clip(state):
    embedder = FrozenCLIPEmbedder(str(TEXT), max_length=16)
    embedder.load_state_dict(state)
    return embedder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True, raising=False)


# CLIP


def test_clip_is_the_last_hidden_state_of_transformers_own_model(clip, state):
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(TEXT)).eval()
    names = {name.replace("text_model.", ""): name for name in model.state_dict()}
    plain = {name.replace("transformer.text_model.", ""): value for name, value in state.items()}
    model.load_state_dict({names[name]: value for name, value in plain.items()})
    with torch.no_grad():
        expected = model(input_ids=clip.tokenizer(PROMPTS)).last_hidden_state
    found = clip(PROMPTS)
    assert found.shape == (4, 16, 128) and torch.equal(found, expected)
    assert torch.equal(clip.encode(PROMPTS), found)
    assert torch.equal(clip("a photo of a horse"), clip(["a photo of a horse"]))


def clip_by_hand(tokens, state, heads):
    """arXiv 2103.00020 §2.4, in float64: pre-norm transformer, causal attention, x σ(1.702 x), a last layer norm."""
    state = {name.removeprefix("transformer.text_model."): value.double() for name, value in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = state["embeddings.token_embedding.weight"][tokens] + state["embeddings.position_embedding.weight"]
    n, length, width = x.shape
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in range(1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder"))):
        at = f"encoder.layers.{layer}"
        h = norm(x, f"{at}.layer_norm1")
        q, k, v = (linear(h, f"{at}.self_attn.{p}_proj").view(n, length, heads, -1) for p in "qkv")
        scores = torch.einsum("nihd,njhd->nhij", q, k) / math.sqrt(width // heads)
        mixed = torch.einsum("nhij,njhd->nihd", scores.masked_fill(later, -torch.inf).softmax(-1), v)
        x = x + linear(mixed.reshape(n, length, width), f"{at}.self_attn.out_proj")
        h = linear(norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
        x = x + linear(h * torch.sigmoid(1.702 * h), f"{at}.mlp.fc2")
    return norm(x, "final_layer_norm")


def test_clip_agrees_with_a_plain_computation(clip, state):
    expected = clip_by_hand(clip.tokenizer(PROMPTS), state, heads=4)
    assert torch.allclose(clip(PROMPTS).double(), expected, rtol=1e-4, atol=1e-5)


def test_bundled_tokenizer_pads_cuts_and_knows_unknown_words(clip):
    tokens = clip.tokenizer(PROMPTS)
    pad, unknown, start, end = 0, 1, 2, 3
    assert tokens[0].tolist() == [start, 4, 21, 20, 4, 16, end] + [pad] * 9
    assert tokens[1].tolist() == [start, end] + [pad] * 14
    assert tokens[2].tolist() == [start, 4, 26, unknown, end] + [pad] * 11
    assert tokens[3].tolist() == [start, *([4, 9, 21, 20, 4, 14] * 3)[:14], end]
    assert [clip.count_tokens(prompt) for prompt in PROMPTS] == [7, 2, 5, 26]
    assert torch.equal(clip.tokenizer("A PHOTO of a horse"), tokens[:1])


def test_clip_is_frozen_until_made_trainable(clip):
    assert not clip.training and not any(parameter.requires_grad for parameter in clip.parameters())
    assert not clip(["a cat"]).requires_grad
    clip.requires_grad_(True)
    clip(["a cat"]).sum().backward()
    assert all(parameter.grad is not None for parameter in clip.parameters())


@pytest.mark.parametrize("prompts", [[], [1], [None], ["a", 2]])
def test_prompts_must_be_strings(clip, prompts):
    fails(ValueError, lambda: clip(prompts), "prompts: expected a list of strings")


# the names of CLIP's parameters


class Older(nn.Module):
    """CLIPTextModel as older releases of transformers name its parameters."""

    def __init__(self, model):
        super().__init__()
        self.text_model = model


def embedder(release):
    made = FrozenCLIPEmbedder(str(TEXT), max_length=16)
    inner = getattr(made.transformer, "text_model", made.transformer)
    made.transformer = Older(inner) if release == "older" else inner
    return made


def without_text_model(state):
    return {name.replace("text_model.", ""): value for name, value in state.items()}


def with_positions(state):
    return {"transformer.text_model.embeddings.position_ids": torch.arange(16)[None], **state}


@pytest.mark.parametrize("release", ["older", "newer"])
@pytest.mark.parametrize("naming", [dict, without_text_model, with_positions])
@pytest.mark.parametrize("prefix", ["", "model.cond_stage_model."])
@pytest.mark.parametrize("device, assign", [("cpu", False), ("cpu", True), ("meta", True)])
def test_every_naming_loads_and_the_published_one_is_given(state, release, naming, prefix, device, assign):
    made = embedder(release).to(device)
    module = made
    for name in reversed(prefix.split(".")[:-1]):
        parent = nn.Module()
        parent.add_module("before", nn.Linear(1, 1, device=device))
        parent.add_module(name, module)
        parent.add_module("transformer", nn.Linear(1, 1, device=device))  # must be left alone
        module = parent
    others = {name: torch.ones(value.shape) for name, value in module.state_dict().items() if "text_model" not in name}
    content = {**others, **{prefix + name: value for name, value in naming(state).items()}}
    module.load_state_dict(content, assign=assign)
    found = module.state_dict()
    assert set(found) == {*others, *(prefix + name for name in state)}
    assert all(torch.equal(found[prefix + name], value) for name, value in state.items())
    assert all(torch.equal(found[name], value) for name, value in others.items())


@pytest.mark.parametrize("release", ["older", "newer"])
def test_missing_and_unexpected_names_are_still_errors(state, release):
    made = embedder(release)
    name = "transformer.text_model.final_layer_norm.bias"
    with pytest.raises(RuntimeError, match="Missing key.*final_layer_norm.bias"):
        made.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match="Unexpected key.*final_layer_norm.other"):
        made.load_state_dict({**state, "transformer.text_model.final_layer_norm.other": torch.zeros(1)})


def test_clip_built_without_memory_works_once_its_weights_are_there(clip, state):
    with torch.device("meta"):
        made = FrozenCLIPEmbedder(str(TEXT), max_length=16)
    made.to_empty(device="cpu")
    for buffer in made.buffers():
        buffer.fill_(10**6)  # what happened to be in memory
    made.load_state_dict(state)
    assert torch.equal(made(PROMPTS), clip(PROMPTS))


# the architectures


def test_the_published_text_encoder_needs_no_access_to_the_hub():
    with torch.device("meta"):
        made = FrozenCLIPEmbedder()
    shapes = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    at = "transformer.text_model"
    assert sum(math.prod(shape) for shape in shapes.values()) == 123_060_480
    assert len(shapes) == 2 + 12 * 16 + 2
    assert shapes[f"{at}.embeddings.token_embedding.weight"] == (49408, 768)
    assert shapes[f"{at}.embeddings.position_embedding.weight"] == (77, 768)
    assert shapes[f"{at}.encoder.layers.11.mlp.fc1.weight"] == (3072, 768)
    assert shapes[f"{at}.encoder.layers.0.self_attn.q_proj.bias"] == shapes[f"{at}.final_layer_norm.bias"] == (768,)
    config = made.transformer.config
    assert config.hidden_act == "quick_gelu" and config.num_attention_heads == 12 and config.layer_norm_eps == 1e-5
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_a_folder_describes_its_network(tmp_path):
    shutil.copy(TEXT / "tokenizer.json", tmp_path)
    with torch.device("meta"):  # the tokenizer's files alone
        assert FrozenCLIPEmbedder(str(tmp_path)).transformer.config.hidden_size == 768
    whole = {"model_type": "clip", "text_config": json.loads((TEXT / "config.json").read_text()), "projection_dim": 9}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert FrozenCLIPEmbedder(str(tmp_path), max_length=16).transformer.config.hidden_size == 128
    fails(ValueError, lambda: FrozenCLIPEmbedder(str(tmp_path), max_length=77), "max_length 77", tmp_path, "1 … 16")
    (tmp_path / "config.json").write_text("{")
    fails(ValueError, lambda: FrozenCLIPEmbedder(str(tmp_path)), tmp_path / "config.json", "not a readable")


def test_a_tokenizer_of_another_network_is_refused(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TEXT / name, tmp_path)
    (tmp_path / "config.json").write_text(
        (TEXT / "config.json").read_text().replace('"vocab_size": 29', '"vocab_size": 9')
    )
    made = FrozenCLIPEmbedder(str(tmp_path), max_length=16)
    assert made(["a airplane"]).shape == (1, 16, 128)
    fails(ValueError, lambda: made(["a horse"]), "the network knows 0 … 8", "0 … 16")


def test_where_there_is_no_tokenizer_the_message_says_what_to_do(tmp_path):
    shutil.copy(TEXT / "config.json", tmp_path)
    made = FrozenCLIPEmbedder(str(tmp_path), max_length=16)  # the network needs none
    fails(
        FileNotFoundError, lambda: made(["a"]), tmp_path, "no tokenizer", "tokenizer.json or vocab.json and merges.txt"
    )
    (tmp_path / "tokenizer.json").write_text("{")
    fails(ValueError, lambda: made(["a"]), tmp_path, "not a readable tokenizer")
    advice = "cond_stage_config.params.version=FOLDER"
    fails(FileNotFoundError, lambda: PromptTokenizer("no/where", 77, "CLIPTokenizer")(["a"]), "'no/where'", advice)
    fails(FileNotFoundError, lambda: PromptTokenizer("a b c/", 77, "BertTokenizer").count("a"), "'a b c/'", advice)
    fails(FileNotFoundError, lambda: FrozenCLIPEmbedder("no/where"), "version=no/where", "neither a folder")


def test_clips_own_vocabulary_files(tmp_path):
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "h", "i</w>", "hi</w>", "a</w>", "i"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i</w>\n")
    tokenize = PromptTokenizer(str(tmp_path), 6, "CLIPTokenizer")
    assert tokenize(["Hi a"]).tolist() == [[0, 4, 5, 1, 1, 1]]  # CLIP pads with the end of the text
    assert tokenize.count("hi hi hi hi hi hi") == 8


# BERT


def bert(**options):
    torch.manual_seed(0)
    made = BERTEmbedder(n_embed=48, n_layer=2, vocab_size=20, max_seq_len=7, use_tokenizer=False, **options)
    return made.eval().requires_grad_(False)


def bert_by_hand(tokens, state):
    state = {name.removeprefix("transformer."): value for name, value in state.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    n, length = tokens.shape
    x = state["token_emb.weight"][tokens] + state["pos_emb.emb.weight"][:length]
    for layer in range(2):
        at, then = f"attn_layers.layers.{2 * layer}", f"attn_layers.layers.{2 * layer + 1}"
        h = norm(x, f"{at}.0")
        q, k, v = ((h @ state[f"{at}.1.to_{p}.weight"].T).view(n, length, 8, 64) for p in "qkv")
        attention = (torch.einsum("nihd,njhd->nhij", q, k) / 8).softmax(-1)
        mixed = torch.einsum("nhij,njhd->nihd", attention, v).reshape(n, length, 512)
        x = x + mixed @ state[f"{at}.1.to_out.weight"].T + state[f"{at}.1.to_out.bias"]
        h = norm(x, f"{then}.0") @ state[f"{then}.1.net.0.0.weight"].T + state[f"{then}.1.net.0.0.bias"]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ state[f"{then}.1.net.2.weight"].T + state[f"{then}.1.net.2.bias"]
    return norm(x, "norm")


@pytest.mark.parametrize("length", [7, 4])
def test_bert_agrees_with_a_plain_computation(length):
    made = bert().double()
    for value in made.state_dict().values():
        value.normal_(std=0.2)
    tokens = torch.randint(20, (3, length), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(made(tokens), bert_by_hand(tokens, made.state_dict()), rtol=1e-10, atol=1e-10)


def test_bert_reads_tokens_in_both_directions_and_in_their_order():
    made, tokens = bert(), torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    changed = made(torch.tensor([[1, 2, 3, 4, 5, 6, 8]])) - made(tokens)
    assert (changed.abs().amax(-1) > 1e-6).all()  # a later word changes every embedding
    swapped = made(torch.tensor([[2, 1, 3, 4, 5, 6, 7]]))
    assert (swapped[:, 2:] - made(tokens)[:, 2:]).abs().max() > 1e-6


def test_berts_published_names_and_shapes():
    with torch.device("meta"):
        made = BERTEmbedder(n_embed=1280, n_layer=32)
    shapes = {name.removeprefix("transformer."): tuple(v.shape) for name, v in made.state_dict().items()}
    expected = {"token_emb.weight": (30522, 1280), "pos_emb.emb.weight": (77, 1280)}
    for layer in range(32):
        at, then = f"attn_layers.layers.{2 * layer}", f"attn_layers.layers.{2 * layer + 1}"
        expected |= {f"{place}.0.{kind}": (1280,) for place in (at, then) for kind in ("weight", "bias")}
        expected |= {f"{at}.1.to_{kind}.weight": (512, 1280) for kind in "qkv"}
        expected |= {f"{at}.1.to_out.weight": (1280, 512), f"{at}.1.to_out.bias": (1280,)}
        expected |= {f"{then}.1.net.0.0.weight": (5120, 1280), f"{then}.1.net.0.0.bias": (5120,)}
        expected |= {f"{then}.1.net.2.weight": (1280, 5120), f"{then}.1.net.2.bias": (1280,)}
    expected |= {"norm.weight": (1280,), "norm.bias": (1280,)}
    expected |= {"to_logits.weight": (30522, 1280), "to_logits.bias": (30522,)}
    assert shapes == expected


def test_bert_with_prompts(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "##s", "of"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    made = BERTEmbedder(32, 1, vocab_size=9, max_seq_len=8, version=str(tmp_path))
    assert made.tokenizer(["A photos zebra", ""]).tolist() == [[2, 5, 6, 7, 1, 3, 0, 0], [2, 3, 0, 0, 0, 0, 0, 0]]
    assert made(["a", "of a"]).shape == (2, 8, 32)
    assert made.count_tokens("photos " * 6) == 14
    assert made(["a"]).requires_grad  # this one is trained with the model


def test_bert_refuses_other_tokens():
    made = bert()
    fails(ValueError, lambda: made(torch.zeros(1, 8, dtype=torch.long)), "at most 7", "found 8")
    fails(ValueError, lambda: made(torch.tensor([[20]])), "0 … 19")
    fails(ValueError, lambda: made(torch.zeros(1, 3)), "whole numbers")
    fails(ValueError, lambda: made.count_tokens("a"), "use_tokenizer")


# classes


def test_class_embedder():
    made = ClassEmbedder(5, n_classes=4, key="class_label")
    labels = torch.tensor([3, 0, 3])
    assert set(made.state_dict()) == {"embedding.weight"}
    assert torch.equal(made(labels), made.embedding.weight[labels].unsqueeze(1)) and made(labels).shape == (3, 1, 5)
    assert torch.equal(made({"class_label": labels}), made(labels))
    assert torch.equal(made({"other": labels}, key="other"), made.encode(labels))
    for wrong in ([4], [-1], [0, 9]):
        fails(ValueError, lambda wrong=wrong: made(torch.tensor(wrong)), "class labels: expected 0 … 3", wrong[-1])
    for wrong in (torch.zeros(2), torch.zeros(2, 1, dtype=torch.long)):
        fails(ValueError, lambda wrong=wrong: made(wrong), "whole numbers [N]")
