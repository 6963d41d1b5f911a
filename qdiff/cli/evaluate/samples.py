"""Images of a model for evaluate.py: the calibrated network's and the float one's, of the same seeds, as PNG files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import qdiff
from qdiff.api.sampling import batches, sample_batches
from qdiff.calibration.resume import differences
from qdiff.checkpoints.native import read_about
from qdiff.cli.flags import check_runtime_flags
from qdiff.cli.models.any_family import ChosenModel, LoadedModel, choose_model
from qdiff.cli.runs.sampling import CONFIG_NAME, describe_runtime, missing_batches, warn_of_start
from qdiff.evaluation.images import file_digest
from qdiff.families.diffusion import run
from qdiff.utils.atomic import remove_leftovers
from qdiff.utils.files import sole_user, write_text
from qdiff.utils.images import save_png

IMAGES, FLOAT_IMAGES = "images", "float"  # folders below the output folder
BATCH = 16  # where the configuration has none


@dataclass(frozen=True)
class SamplingPlan:
    """What will be sampled, and where to: `parent`/images of the calibrated network, `parent`/float of the float one.

    Without a checkpoint the float model's images are the ones to judge. with_float: whether the float ones are wanted.
    """

    args: argparse.Namespace
    model: ChosenModel
    device: torch.device
    parent: Path
    with_float: bool

    @property
    def prompts(self) -> tuple[str, ...] | None:
        """What each image is asked for; None for models without prompts."""
        if self.model.family != "text":
            return None
        return tuple(self.model.entries[i % len(self.model.entries)] for i in range(self.args.max_images))

    @property
    def batch_size(self) -> int:
        return self.args.sample_batch_size or self.model.batch_size or BATCH

    def describe(self, checkpoint: Path | None) -> dict[str, Any]:
        """Plain data that know a folder of images again."""
        return {
            **self.model.where,
            "weights_sha256": file_digest(self.model.weights()),
            "checkpoint_sha256": None if checkpoint is None else file_digest(checkpoint),
            **(describe_runtime(self.args) if checkpoint else {}),
            "images": self.args.max_images,
            "batch_size": self.batch_size,
            **self.model.pipeline.describe(),
            "asked_for": list(self.model.entries),
        }


def plan_sampling(args: argparse.Namespace, parent: Path, device: torch.device) -> SamplingPlan:
    """Check the flags. Raises ValueError naming the one at fault."""
    args.ptq = args.cali_ckpt is not None  # what the runtime's flags ask about
    check_runtime_flags(args, device)
    if args.cali_ckpt is not None:
        if args.cali_ckpt.suffix == ".pth":
            scripts = "sample with the script of its family and evaluate the folder"
            raise ValueError(f"--cali_ckpt {args.cali_ckpt}: expected a packed .safetensors; for a ckpt.pth, {scripts}")
        read_about(args.cali_ckpt)
    return SamplingPlan(args, choose_model(args), device, parent, args.cali_ckpt is not None and args.float is None)


def sample_folders(plan: SamplingPlan) -> tuple[Path, Path | None]:
    """(folder of the images to judge, folder of the float model's); images that are there are not sampled again."""
    plan.parent.mkdir(parents=True, exist_ok=True)
    warn_of_start(plan.model.pipeline)
    checkpoint = plan.args.cali_ckpt
    wanted = {plan.parent / IMAGES: checkpoint} | ({plan.parent / FLOAT_IMAGES: None} if plan.with_float else {})
    with sole_user(plan.parent):
        remove_leftovers(plan.parent)
        for folder, source in wanted.items():
            _settle(folder, plan.describe(source))
        todo = {folder: _missing(plan, folder) for folder in wanted}
        model = plan.model.load(plan.device) if any(todo.values()) else None
        for folder, source in wanted.items():
            if todo[folder]:
                network = model.network if source is None else _calibrated(plan, model, source)
                _write(plan, model, network, folder, todo[folder])
    return plan.parent / IMAGES, plan.parent / FLOAT_IMAGES if plan.with_float else None


def _path_of(folder: Path) -> Callable[[int], Path]:
    return lambda index: folder / f"{index}.png"


def _missing(plan: SamplingPlan, folder: Path) -> list[range]:
    path_of = _path_of(folder)
    indices = list(batches(0, plan.args.max_images, plan.batch_size))
    return missing_batches(indices, lambda batch: [path_of(index) for index in batch])


def _settle(folder: Path, description: dict[str, Any]) -> None:
    """Begin a folder of images, or go on with it. Raises ValueError where it is of something else."""
    folder.mkdir(exist_ok=True)
    config = folder / CONFIG_NAME
    text = yaml.safe_dump(description, sort_keys=False, width=100, allow_unicode=True)
    if config.is_file():
        found = yaml.safe_load(config.read_text(encoding="utf8"))
        if found != yaml.safe_load(text):
            reason = differences(found, yaml.safe_load(text))
            raise ValueError(f"{folder}: holds images of another run, choose another --outdir: {reason}")
    elif any(folder.glob("*.png")):
        raise ValueError(f"{folder}: holds images that were not made by this script; choose another --outdir")
    else:
        write_text(config, text)


def _calibrated(plan: SamplingPlan, model: LoadedModel, checkpoint: Path) -> nn.Module:
    """The network of a checkpoint, as --runtime has it. Raises ValueError where it is another model's."""
    about, adapter = read_about(checkpoint), plan.model.adapter
    expected = adapter.config_of(model.network)
    if about["family"] != adapter.family or {**about["config"], "dropout": 0} != {**expected, "dropout": 0}:
        raise ValueError(f"{checkpoint}: made for another network than that of {next(iter(plan.model.where.values()))}")
    return qdiff.load(checkpoint, plan.args.runtime, device=plan.device, prefer=plan.args.prefer, report=print)


@torch.no_grad()
def _write(plan: SamplingPlan, model: LoadedModel, network: nn.Module, folder: Path, todo: list[range]) -> None:
    """Sample batches, into files."""

    def sample(batch: range, observe: Callable) -> Tensor:
        return model.decode(run(model.start(batch), model.predictor(network, batch), observe))

    title = "float images" if folder.name == FLOAT_IMAGES else "images"
    for batch, images in sample_batches(sample, plan.model.steps, todo, title):
        for index, image in zip(batch, images, strict=True):
            save_png(image, _path_of(folder)(index))
