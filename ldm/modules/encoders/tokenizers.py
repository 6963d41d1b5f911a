"""Tokenizers of the text encoders: read at first use, from a folder or from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddim.checkpoints import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAST = "tokenizer.json"  # a whole tokenizer of any kind in one file
EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")
FILES = {"CLIPTokenizer": ("vocab.json", "merges.txt"), "BertTokenizer": ("vocab.txt",)}


class PromptTokenizer:
    """Prompts -> tokens [N, max_length], cut off or padded. `kind` is the transformers class, one of `FILES`."""

    def __init__(self, version: str, max_length: int, kind: str):
        self.version, self.max_length, self.kind = version, max_length, kind
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def __call__(self, prompts: str | list[str]) -> Tensor:
        """Raises ValueError for what is no list of prompts, and where there is no tokenizer, as `tokenizer`."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts: expected a list of strings, found {prompts!r:.80}")
        options = {"truncation": True, "padding": "max_length", "max_length": self.max_length}
        return torch.tensor(self.tokenizer(prompts, **options)["input_ids"])

    def count(self, prompt: str) -> int:
        """Number of tokens of a prompt before it is cut off, start and end included."""
        return len(self.tokenizer(prompt, verbose=False)["input_ids"])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises FileNotFoundError or ValueError, each with what to do, where the tokenizer cannot be had."""
        if self._tokenizer is None:
            self._tokenizer = _read(self._folder(), self.kind)
        return self._tokenizer

    def _folder(self) -> Path:
        if Path(self.version).is_dir():
            if _is_complete(Path(self.version), self.kind):
                return Path(self.version)
            raise FileNotFoundError(f"{self.version}: no tokenizer in this folder, expected {_expected(self.kind)}")
        folder = _download(self.version, self.kind)
        if folder and _is_complete(folder, self.kind):
            return folder
        advice = "name a folder with its files: cond_stage_config.params.version=FOLDER"
        raise FileNotFoundError(
            f"no tokenizer for {self.version!r}, neither a folder of that name nor on the hub; {advice} "
            f"({_expected(self.kind)})"
        )


def _expected(kind: str) -> str:
    return f"{FAST} or {' and '.join(FILES[kind])}"


def _is_complete(folder: Path, kind: str) -> bool:
    # Asked here because transformers itself may make an empty tokenizer where the files are missing.
    return (folder / FAST).is_file() or all((folder / name).is_file() for name in FILES[kind])


def _download(version: str, kind: str) -> Path | None:
    """The folder of the hub's cache that holds the tokenizer, downloaded if needed; None where it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    for local in (True, False):  # what was downloaded before needs no network
        try:
            names = [FAST, *EXTRAS, *FILES[kind]]
            folder = Path(snapshot_download(version, allow_patterns=names, local_files_only=local))
        except (OSError, HfHubHTTPError, HFValidationError):
            continue
        if _is_complete(folder, kind):
            return folder
    return None


def _read(folder: Path, kind: str) -> PreTrainedTokenizerBase:
    import transformers

    name = "PreTrainedTokenizerFast" if (folder / FAST).is_file() else kind
    try:
        tokenizer = getattr(transformers, name).from_pretrained(folder)
    except Exception as error:  # the readers of these files raise nearly anything
        raise ValueError(f"{folder}: not a readable tokenizer: {one_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
