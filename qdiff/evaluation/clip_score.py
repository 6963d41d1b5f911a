"""CLIP score: how well images fit their prompts (arXiv 2104.08718), with a CLIP model of your own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn


class ClipScore:
    """100 · max(cos(image, prompt), 0) of every image, as torchmetrics and the papers on text-to-image models have it.

    folder: a transformers CLIP model with its tokenizer and preprocessor. Nothing is fetched. Raises ValueError naming
    the folder where it is none.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: expected the folder of a transformers CLIP model, found no config.json")
        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{folder}: expected the folder of a transformers CLIP model: {reason}") from error
        self.name = folder.name

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: uint8 [N, 3, H, W]; a prompt for each, cut to what the text encoder takes. Returns [N] float64."""
        device = next(self.model.parameters()).device
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(device)
        longest = self.model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options).to(device)
        inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        found = self.model(pixel_values=pixels, **inputs)
        cosines = nn.functional.cosine_similarity(found.image_embeds, found.text_embeds, dim=-1)
        return 100 * cosines.clamp(min=0).double().cpu()
