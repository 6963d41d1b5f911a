"""Train a model of configs/train: the pixel model, a first stage, or a latent model.

Writes <logdir>/ with config.yaml, run.log, metrics/ and checkpoints/last.ckpt; --export writes the trained weights as
the bundled models are: model.safetensors (averaged weights, float16) and config.yaml. Arguments of the form KEY=VALUE
replace values of the configuration, e.g. model.base_learning_rate=1e-4.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qdiff.cli.command import print_plan, start_log
from qdiff.cli.parser import make_parser, whole
from qdiff.cli.training import LAST, make_trainer, quiet
from qdiff.families.ldm.training import (
    TEXT,
    exported_config,
    exported_state,
    instantiate_from_config,
    load_config,
    load_weights,
    scale_factor_of,
    text_folder,
)
from qdiff.utils.files import load_pickle, save_safetensors, sole_user, write_text

logger = logging.getLogger(__name__)
SECTIONS = {"model": ("target", "params"), "data": ("target", "params"), "lightning": ("trainer",)}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    parser.epilog = "KEY=VALUE replaces a value of the configuration, e.g. model.base_learning_rate=1e-4."
    group = parser.add_argument_group("training")
    group.add_argument("--config", type=Path, required=True, help="what to train, e.g. configs/train/cifar10-ddim.yaml")
    group.add_argument("--data", type=Path, metavar="PATH", help="a folder with cifar-10-batches-py, or an .npz file")
    group.add_argument("--max_steps", type=whole(0), help="optimizer steps in all (default: the configuration's)")
    group.add_argument("--batch_size", type=whole(1), help="images per step and device (default: the configuration's)")
    group.add_argument("--seed", type=whole(0, 2**32 - 1), default=1234, help="every random draw comes from it")
    resumes = "go on with an interrupted training: its checkpoint or folder, or without a value the one in --logdir"
    group.add_argument("--resume", nargs="?", const="", metavar="CKPT", help=resumes)
    group = parser.add_argument_group("machine")
    group.add_argument("--accelerator", default="auto", help="auto, cpu, gpu, ...")
    group.add_argument("--devices", default="1", help="number of devices, their indices 0,1 or auto")
    group.add_argument("--num_nodes", type=whole(1), default=1, help="machines that train together")
    group.add_argument("--precision", choices=("32", "16-mixed", "bf16-mixed"), default="32", help="of arithmetic")
    group = parser.add_argument_group("output")
    group.add_argument("-l", "--logdir", type=Path, help="the run's folder (default: outputs/train/<name of --config>)")
    group.add_argument("--export", type=Path, metavar="PATH", help="a folder for the trained model, or a .safetensors")
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files, into tensorboard/")
    group.add_argument("--verbose", action="store_true", help="log more, and show tracebacks")
    group.add_argument("--dry_run", action="store_true", help="print the plan and stop")
    args, rest = parser.parse_known_args(argv)
    if unknown := [text for text in rest if text.startswith("-") or "=" not in text]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; overrides have the form KEY=VALUE")
    if args.resume and "=" in args.resume and not Path(args.resume).exists():
        rest, args.resume = [args.resume, *rest], ""  # an override that follows a --resume without a value
    args.overrides = rest
    return args


@dataclass(frozen=True)
class Plan:
    """What a run will do. `checkpoint` is what it goes on from."""

    args: argparse.Namespace
    config: dict[str, Any]
    folder: Path
    checkpoint: Path | None

    @property
    def weights(self) -> Path | None:
        """The file that --export asks for."""
        export = self.args.export
        return export if export is None or export.suffix == ".safetensors" else export / "model.safetensors"

    def describe(self) -> dict[str, Any]:
        """Plain data for --dry_run and the run's config.yaml."""
        machine = {name: getattr(self.args, name) for name in ("accelerator", "devices", "num_nodes", "precision")}
        return {
            **self.config,
            "seed": self.args.seed,
            "machine": machine,
            "resumed_from": None if self.checkpoint is None else str(self.checkpoint),
            "export": None if self.weights is None else str(self.weights),
            "folder": str(self.folder),
        }


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration with the flags in it, as plain data. Raises FileNotFoundError, or ValueError naming a fault."""
    config = load_config(args.config, args.overrides)
    given = {"lightning.trainer.max_steps": args.max_steps, "data.params.batch_size": args.batch_size}
    for name in ("train", "validation"):
        if args.data is not None and OmegaConf.select(config, f"data.params.{name}") is not None:
            given[f"data.params.{name}.params.path"] = str(args.data)
    for key, value in given.items():
        if value is not None:
            OmegaConf.update(config, key, value)
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:  # a value that refers to another one
        raise ValueError(f"{args.config}: {str(error).splitlines()[0]}") from error
    del plain["config_file"]
    for section, keys in SECTIONS.items():
        for key in keys:
            if not isinstance(plain.get(section), dict) or plain[section].get(key) is None:
                raise ValueError(f"{args.config}: missing {section}.{key}")
    steps = plain["lightning"]["trainer"].get("max_steps")
    if type(steps) is not int or steps < 0:
        raise ValueError(f"{args.config}: lightning.trainer.max_steps: expected a whole number, found {steps!r}")
    return plain


def make_plan(args: argparse.Namespace) -> Plan:
    """Check flags against one another and against files. Raises ValueError or FileNotFoundError naming the fault."""
    config = read_config(args)
    folder = args.logdir or Path("outputs/train") / args.config.stem
    checkpoint = None
    if args.resume is not None:
        checkpoint = Path(args.resume) if args.resume else folder
        if checkpoint.is_dir():
            checkpoint = checkpoint / LAST
        if not checkpoint.is_file():
            raise FileNotFoundError(f"--resume: no checkpoint {checkpoint}")
        if args.logdir is None and args.resume and checkpoint.parent.name == LAST.parent.name:
            folder = checkpoint.parent.parent
    elif (folder / LAST).exists():
        raise ValueError(f"--logdir {folder}: holds a training; give --resume to go on with it, or another folder")
    if checkpoint is None and config["lightning"]["trainer"]["max_steps"] == 0:
        raise ValueError("--max_steps 0: trains nothing, so it needs --resume")
    if args.export is not None:
        exported_config(config["model"])  # what cannot be exported fails now, not after the training
    return Plan(args, config, folder, checkpoint)


def build(plan: Plan) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Model and data, every weight and draw from --seed."""
    pl.seed_everything(plan.args.seed, verbose=False)
    model_config, data_config = plan.config["model"], plan.config["data"]
    for config in (model_config, data_config, *(data_config["params"].get(name) for name in ("train", "validation"))):
        if config is not None:
            config.setdefault("params", {}).setdefault("seed", plan.args.seed)
    model = instantiate_from_config({key: model_config[key] for key in ("target", "params")})
    if not isinstance(model, pl.LightningModule):
        raise ValueError(f"{plan.args.config}: model.target {model_config['target']}: cannot be trained")
    if "base_learning_rate" in model_config:
        model.learning_rate = float(model_config["base_learning_rate"])
    model.configure_optimizers()  # what it refuses is said before anything is written
    return model, instantiate_from_config(data_config)


def check_checkpoint(plan: Plan, model: pl.LightningModule) -> None:
    """Raise ValueError where the checkpoint to go on from is damaged, or of another training."""
    content = load_pickle(plan.checkpoint, "checkpoint")
    wanted = ("state_dict", "optimizer_states", "loops", "global_step")
    if not isinstance(content, dict) or not all(key in content for key in wanted):
        raise ValueError(f"--resume {plan.checkpoint}: it does not hold the state of a training")
    load_weights(model, content["state_dict"], plan.checkpoint)
    before = plan.checkpoint.parent.parent / "config.yaml"
    if before.is_file():
        found = yaml.safe_load(before.read_text(encoding="utf8"))
        if found.get("seed") != plan.args.seed:
            raise ValueError(f"--seed {plan.args.seed}: contradicts {before}, which has seed {found.get('seed')}")


def export(plan: Plan, model: pl.LightningModule) -> None:
    """Write the trained weights, the configuration, and the text encoder's tokenizer beside them."""
    config = plan.config["model"]
    written = exported_config(config, scale_factor_of(model))
    if "pretrained" in written:
        written["pretrained"] = plan.weights.name
    save_safetensors(exported_state(model), plan.weights, {"format": "pt"})
    write_text(plan.weights.with_name("config.yaml"), yaml.safe_dump(written, sort_keys=False))
    folder = text_folder(config)
    target = plan.weights.parent / TEXT
    if folder is not None and folder.resolve() != target.resolve():
        target.mkdir(exist_ok=True)
        for file in (*folder.glob("*.json"), *folder.glob("*.txt")):
            shutil.copyfile(file, target / file.name)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    plan = make_plan(args)
    if args.dry_run:
        print_plan(plan.describe())
        return
    quiet()
    model, data = build(plan)
    if plan.checkpoint is not None:
        check_checkpoint(plan, model)
    trainer = make_trainer(plan.config["lightning"], plan.folder, args)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with sole_user(plan.folder) if trainer.is_global_zero else nullcontext():
        fit(plan, trainer, model, data)


def fit(plan: Plan, trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Train, and write the weights where they are asked for."""
    if trainer.is_global_zero:
        start_log(plan.folder, plan.args.verbose)
        logger.info("plan: %s", json.dumps(plan.describe()))
        write_text(plan.folder / "config.yaml", yaml.safe_dump(plan.describe(), sort_keys=False))
    try:
        trainer.fit(model, datamodule=data, ckpt_path=plan.checkpoint, weights_only=True)
    except SystemExit as end:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from end
    if trainer.is_global_zero:
        if not (plan.folder / LAST).exists():  # there was no step left to take
            (plan.folder / LAST).parent.mkdir(exist_ok=True)
            shutil.copyfile(plan.checkpoint, plan.folder / LAST)
        if plan.weights is not None:
            export(plan, model)
        where = plan.folder / LAST if plan.weights is None else plan.weights
        print(f"{trainer.global_step} steps; {where}")
