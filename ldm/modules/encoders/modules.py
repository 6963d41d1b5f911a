"""Conditioning: prompts or class labels -> embeddings [N, L, D] that the U-Net attends to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddim.checkpoints import one_line
from ddim.limits import BLOCKS, CLASSES, POSITIONS, WIDTH, check_limits
from ldm.modules.encoders.tokenizers import PromptTokenizer
from ldm.modules.encoders.x_transformer import TokenTransformer, check_tokens

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

# The text half of openai/clip-vit-large-patch14, on which Stable Diffusion v1 is conditioned: 123.06 M parameters.
CLIP_VIT_L_14 = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}


CLIP_LIMITS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim", "num_attention_heads"), WIDTH),
    "vocab_size": CLASSES,
    "num_hidden_layers": BLOCKS,
    "max_position_embeddings": POSITIONS,
}


class FrozenCLIPEmbedder(nn.Module):
    """The text transformer of CLIP (arXiv 2103.00020): prompts -> its last hidden states [N, max_length, D].

    `version` is a folder with the tokenizer's files, or a name on the hub. A folder's `config.json` describes the
    network; without one it is CLIP ViT-L/14's, and so for that model's name, which needs no access to the hub.
    Weights are random until they are loaded. Names in state dicts are the published ones, `transformer.text_model.*`,
    whatever the transformers release; state dicts without `text_model.` load too.
    Raises ValueError for a description that is unreadable or shorter than `max_length`.
    """

    def __init__(self, version: str = "openai/clip-vit-large-patch14", device: Any = None, max_length: int = 77):
        # `device` is accepted for published configurations: the module is where it is moved to
        super().__init__()
        from transformers import CLIPTextModel  # takes seconds, and models without text have no use for it

        config = _clip_config(version)
        if not 0 < max_length <= config.max_position_embeddings:
            known = config.max_position_embeddings
            raise ValueError(f"max_length {max_length}: the text encoder {version!r} knows positions 1 … {known}")
        self.max_length = max_length
        self.tokenizer = PromptTokenizer(version, max_length, "CLIPTokenizer")
        self.transformer = CLIPTextModel(config)
        self.register_state_dict_post_hook(_publish_names)
        self.register_load_state_dict_pre_hook(_accept_names)
        self.freeze()

    def freeze(self) -> None:
        """Evaluation mode, no gradients."""
        self.eval().requires_grad_(False)

    def forward(self, text: str | list[str]) -> Tensor:
        weight = self.transformer.get_input_embeddings().weight
        tokens = self.tokenizer(text)
        check_tokens(tokens, len(weight), self.max_length)
        # Given explicitly: the network's own are no part of the state dict, so a model built on meta has none.
        positions = torch.arange(self.max_length, device=weight.device)[None]
        return self.transformer(input_ids=tokens.to(weight.device), position_ids=positions).last_hidden_state

    def encode(self, text: str | list[str]) -> Tensor:
        return self(text)

    def count_tokens(self, prompt: str) -> int:
        """Number of tokens of a prompt, start and end included; those after the first `max_length` are cut off."""
        return self.tokenizer.count(prompt)


def _clip_config(version: str) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    folder = Path(version)
    if version == "openai/clip-vit-large-patch14" or (folder.is_dir() and not (folder / "config.json").is_file()):
        return CLIPTextConfig(**CLIP_VIT_L_14)
    try:
        config = CLIPTextConfig.from_pretrained(version)
        check_limits({name: getattr(config, name) for name in CLIP_LIMITS}, CLIP_LIMITS)
        return config
    except Exception as error:  # the reader of a damaged file raises nearly anything
        if folder.is_dir():
            raise ValueError(f"{folder / 'config.json'}: not a readable text encoder: {one_line(error)}") from None
        what = "neither a folder nor a text encoder on the hub"
        raise FileNotFoundError(f"cond_stage_config.params.version={version}: {what} that can be reached") from None


PUBLISHED = "transformer.text_model."


def _publish_names(module: FrozenCLIPEmbedder, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    _rename(state, prefix, PUBLISHED)


def _accept_names(module: FrozenCLIPEmbedder, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    _rename(state, prefix, PUBLISHED if hasattr(module.transformer, "text_model") else "transformer.")


def _rename(state: dict[str, Tensor], prefix: str, wanted: str) -> None:
    """Names with and without `text_model.` become `wanted`; position_ids, which hold 0, 1, 2, … only, go."""
    for name in [name for name in state if name.startswith(prefix + "transformer.")]:
        value = state.pop(name)
        short = name.removeprefix(prefix + "transformer.").removeprefix("text_model.")
        if not short.endswith("position_ids"):
            state[prefix + wanted + short] = value


class BERTEmbedder(nn.Module):
    """The text encoder of LDM's text-to-image model: BERT's tokens, a transformer of its own -> [N, max_seq_len, D].

    `version` is a folder with the tokenizer's files, or a name on the hub. Without `use_tokenizer` it is called with
    tokens [N, L].
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: Any = None,  # accepted for published configurations: the module is where it is moved to
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        version: str = "bert-base-uncased",
    ):
        super().__init__()
        self.max_length = max_seq_len
        self.tokenizer = PromptTokenizer(version, max_seq_len, "BertTokenizer") if use_tokenizer else None
        self.transformer = TokenTransformer(vocab_size, max_seq_len, n_embed, n_layer, embedding_dropout)

    def forward(self, text: str | list[str] | Tensor) -> Tensor:
        tokens = self.tokenizer(text) if self.tokenizer else text
        weight = self.transformer.token_emb.weight
        check_tokens(tokens, len(weight), self.max_length)
        return self.transformer(tokens.to(weight.device))

    def encode(self, text: str | list[str] | Tensor) -> Tensor:
        return self(text)

    def count_tokens(self, prompt: str) -> int:
        """Number of tokens of a prompt, start and end included; those after the first `max_length` are cut off."""
        if self.tokenizer is None:
            raise ValueError("use_tokenizer is false: there are tokens only, no prompts")
        return self.tokenizer.count(prompt)


class ClassEmbedder(nn.Module):
    """Class labels [N], or a batch that has them under `key` -> [N, 1, embed_dim]."""

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class"):
        super().__init__()
        check_limits({"n_classes": n_classes, "embed_dim": embed_dim}, {"n_classes": CLASSES, "embed_dim": WIDTH})
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Tensor | Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """Raises ValueError for labels that are no whole numbers below n_classes."""
        labels = batch[key or self.key] if isinstance(batch, Mapping) else batch
        known = self.embedding.num_embeddings
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"class labels: expected whole numbers [N], found {labels.dtype} {list(labels.shape)}")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < known:
            found = f"{int(labels.min())} … {int(labels.max())}"
            raise ValueError(f"class labels: expected 0 … {known - 1}, found {found}")
        return self.embedding(labels.to(self.embedding.weight.device)[:, None])

    def encode(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        return self(batch)
