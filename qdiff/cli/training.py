"""The Lightning trainer of train.py: its progress bar, checkpoints and messages."""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from qdiff.cli.progress import check_tensorboard
from qdiff.families.ldm.training import derived_seed

# What a configuration may say about the trainer; the rest are flags.
TRAINER_OPTIONS = (
    *("max_steps", "gradient_clip_val", "accumulate_grad_batches"),
    *("val_check_interval", "limit_val_batches", "log_every_n_steps"),
)
LAST = Path("checkpoints") / "last.ckpt"  # in a run's folder
DEFAULT_CHECKPOINT_EVERY = 1000


def quiet() -> None:
    """Leave out what Lightning says about itself and about choices that are made here."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    expected = (
        *("does not have many workers", "available but not used", "in eval mode", "LeafSpec"),
        *("exists and is not empty", "The dirpath has changed", "AMP with fp16 is not supported on CPU"),
    )
    for message in (f".*{text}.*" for text in expected):
        warnings.filterwarnings("ignore", message)


class StepBar(pl.Callback):
    """A progress bar over the optimizer steps; ends the training when the loss is not finite any more."""

    def __init__(self, every: int = 10) -> None:
        self.every = every  # steps between two looks at the loss, for which a GPU has to be waited for
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            steps = {"total": trainer.max_steps, "initial": trainer.global_step}
            self._bar = tqdm(desc="training", unit="step", dynamic_ncols=True, **steps)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *rest: Any) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            loss = float(outputs["loss"])
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} after {step} steps; lower model.base_learning_rate")
            if self._bar is not None:
                self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, module)


class SeedEachStep(pl.Callback):
    """Layers like dropout draw from the global generator: it depends on (seed, step, process) alone, so that an
    interrupted training goes on as if it had not been."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        batch_of_step = batch_idx % trainer.accumulate_grad_batches
        torch.manual_seed(derived_seed(self.seed, trainer.global_step, batch_of_step, trainer.global_rank))


class FinalCheckpoint(pl.Callback):
    """Writes the checkpoint of the last step within the training loop, as those before it: written after the loop, it
    would count a finished epoch, and a training that goes on from it would draw other numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.save_checkpoint(self.path)


def make_trainer(config: dict[str, Any], folder: Path, args: argparse.Namespace) -> pl.Trainer:
    """The trainer that a configuration's `lightning` section and the flags ask for; it writes below `folder` only.

    Raises ValueError naming an unknown option, or a device or precision that is not there.
    """
    options = dict(config["trainer"])
    if unknown := [name for name in options if name not in TRAINER_OPTIONS]:
        raise ValueError(f"lightning.trainer: expected {', '.join(TRAINER_OPTIONS)}, found {unknown[0]!r}")
    loggers: list[Logger] = [CSVLogger(folder, name="metrics")]
    if args.tensorboard:
        check_tensorboard()
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    checkpoints = ModelCheckpoint(
        (folder / LAST).parent,
        filename=LAST.stem,
        every_n_train_steps=config.get("checkpoint_every", DEFAULT_CHECKPOINT_EVERY),
        enable_version_counter=False,
    )
    try:
        trainer = pl.Trainer(
            accelerator=args.accelerator,
            devices=int(args.devices) if args.devices.isdigit() else args.devices,
            num_nodes=args.num_nodes,
            precision="32-true" if args.precision == "32" else args.precision,
            # The bar comes first: what has diverged is not saved.
            callbacks=[StepBar(), SeedEachStep(args.seed), checkpoints, FinalCheckpoint(folder / LAST)],
            logger=loggers,
            default_root_dir=folder,
            # The training batches are one endless epoch, divided among the processes by the data module.
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
    except (MisconfigurationException, TypeError, RuntimeError, ValueError) as error:
        flags = f"--accelerator {args.accelerator}, --devices {args.devices}, --precision {args.precision}"
        raise ValueError(f"{flags}: {' '.join(str(error).split())[:300]}") from error
    if args.precision == "16-mixed" and trainer.strategy.root_device.type == "cpu":
        raise ValueError("--precision 16-mixed: needs a GPU; a CPU takes 32 or bf16-mixed")
    return trainer
