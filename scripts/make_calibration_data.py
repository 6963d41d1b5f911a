#!/usr/bin/env python
"""Record float sampling states for calibration: one sampling run keeps every step of as many seeds as asked.

Pixel models by --config as in sample_diffusion_ddim.py; latent models by -r, with prompts or classes where they take
them. Writes a folder of native shards, one per batch, or with an --out that ends in .pt or .pth the original toolkit's
file. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sampling import FIRST_CALIBRATION_IMAGE, batches, record_batches
from torch import nn

from qdiff.calibration.trajectories import (
    Trajectories,
    load_trajectories,
    original_layout,
    save_shard,
    shard_path,
    shard_provenance,
)
from qdiff.commandline import (
    GOES_ON,
    add_run_flags,
    add_team_flags,
    choose_device,
    make_parser,
    number,
    print_plan,
    run_main,
    start_log,
    whole,
)
from qdiff.fabric import start_team
from qdiff.files import save_pickle
from qdiff.parallel import Team

logger = logging.getLogger(__name__)
PIXEL_SAMPLERS = ("generalized", "ddpm_noisy", "dpm_solver")
LATENT_SAMPLERS = ("ddim", "plms", "dpm_solver", "ddpm")
OF_LATENT_MODELS = ("scale", "prompt", "from_file", "classes", "uncond_class", "H", "W")
OF_PIXEL_MODELS = ("use_pretrained", "ckpt", "skip_type")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("model")
    group.add_argument("-r", "--resume_base", type=Path, metavar="PATH", help="latent model: checkpoint or its folder")
    group.add_argument("--config", type=Path, help="configuration (default for latent models: the one beside)")
    group.add_argument("--use_pretrained", action="store_true", help="pixel model: the weights of the configuration")
    group.add_argument("--ckpt", type=Path, help="pixel model: float weights of your own, instead of those")
    group = parser.add_argument_group("sampling")
    kinds = f"pixel models: {', '.join(PIXEL_SAMPLERS)}; latent models: {', '.join(LATENT_SAMPLERS)}"
    group.add_argument("--sample_type", help=f"sampler (default: the first). {kinds}")
    group.add_argument("--skip_type", choices=("uniform", "quad"), help="pixel model: spacing of the timesteps")
    group.add_argument("--timesteps", type=whole(1), default=100, help="sampler steps")
    group.add_argument("--eta", type=number(0, 1), default=0.0, help="share of DDPM noise, 0 (DDIM) to 1")
    group = parser.add_argument_group("conditioning of latent models")
    group.add_argument("--scale", type=number(0, 100), help="guidance scale; not 1: pairs of cs and ucs (default: 1)")
    group.add_argument("--prompt", help="what the samples show")
    group.add_argument("--from-file", type=Path, metavar="FILE", help="a prompt per line, which samples take in turn")
    group.add_argument("--classes", nargs="+", metavar="LABEL", help="labels and ranges, taken in turn (default: all)")
    group.add_argument("--uncond_class", type=int, help="the label of no class (default: the last one; -1: none)")
    group.add_argument("--H", type=whole(1), help="height in pixels (default: the model's own)")
    group.add_argument("--W", type=whole(1), help="width in pixels (default: the model's own)")
    group = parser.add_argument_group("calibration data")
    group.add_argument("--n_samples", type=whole(1), default=256, help="number of seeds")
    group.add_argument("--batch_size", type=whole(1), default=64, help="seeds sampled at once; one shard each")
    group.add_argument("--out", type=Path, required=True, help="folder for shards, or a .pt file")
    add_run_flags(parser)
    add_team_flags(parser)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Recording:
    """A model whose sampling states are recorded. `load` gives (provenance of the weights, network on the device,
    (indices, team) -> states of each batch of this process's part)."""

    describe: dict
    steps: int
    load: Callable[[torch.device], tuple[dict, Callable[[list[range], Team], Iterator[tuple[range, Trajectories]]]]]


def plan_recording(args: argparse.Namespace) -> Recording:
    """What the flags ask for. Raises ValueError naming the flag at fault."""
    latent = args.resume_base is not None
    if not latent and args.config is None:
        raise ValueError("--config, -r: name a pixel model by --config, or a latent one by -r")
    for flag in OF_PIXEL_MODELS if latent else OF_LATENT_MODELS:
        if getattr(args, flag) not in (None, False):
            kind = "pixel" if latent else "latent"
            raise ValueError(f"--{flag.replace('_file', '-file')}: for {kind} models only")
    known = LATENT_SAMPLERS if latent else PIXEL_SAMPLERS
    args.sample_type = args.sample_type or known[0]
    if args.sample_type not in known:
        raise ValueError(f"--sample_type {args.sample_type}: expected one of {', '.join(known)} for this model")
    return _latent_recording(args) if latent else _pixel_recording(args)


def _pixel_recording(args: argparse.Namespace) -> Recording:
    from pixel_model import ADAPTER, load_float_model, make_pipeline, read_config, sampler_of

    args.skip_type = args.skip_type or "uniform"
    config = read_config(args)
    pipeline = make_pipeline(args, config)
    steps = len(pipeline.timesteps())

    def load(device: torch.device):
        model = load_float_model(args, config)
        origin = _origin(ADAPTER, model.network) | model.describe()
        sample = sampler_of(pipeline, model.network.to(device))
        return origin, lambda indices, team: record_batches(sample, steps, indices, team=team)

    return Recording({"config": str(args.config), **pipeline.describe()}, steps, load)


def _latent_recording(args: argparse.Namespace) -> Recording:
    from conditioning import asked_of_calibration, calibration_conditioner, digest_of
    from latent_config import read_config
    from latent_model import ADAPTER, latent_size, make_pipeline, origin_of, record_latents

    from ldm.pretrained import find_checkpoint, find_config, load_model

    checkpoint = find_checkpoint(args.resume_base)
    config = read_config(args.config or find_config(checkpoint))
    entries, nothing, scale = asked_of_calibration(args, config)
    options = {"steps": args.timesteps, "eta": args.eta, "scale": scale, "seed": args.seed}
    flag = f"--timesteps {args.timesteps}"
    pipeline = make_pipeline(config, latent_size(args, config), flag, sampler=args.sample_type, **options)

    def load(device: torch.device):
        model = load_model(config, checkpoint).to(device)
        network = model.model.diffusion_model
        conditioner = calibration_conditioner(model, entries, nothing, scale)
        origin = _origin(ADAPTER, network) | origin_of(checkpoint) | {"asked_for": digest_of(entries)}
        return origin, lambda indices, team: record_latents(pipeline, network, conditioner, indices, team)

    return Recording({"checkpoint": str(checkpoint), **pipeline.describe()}, len(pipeline.timesteps()), load)


def _origin(adapter, network: nn.Module) -> dict:
    return {"family": adapter.family, "config": adapter.config_of(network)}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    recording, device = plan_recording(args), choose_device(args.device)
    if args.out.suffix in (".pt", ".pth") and args.out.exists():
        raise FileExistsError(f"--out {args.out}: exists already; remove it, or choose another name")
    if args.dry_run:
        print_plan({**recording.describe, "n_samples": args.n_samples, "out": str(args.out)})
        return
    with start_team(args, device) as team:
        execute(args, recording, team.device or device, team)


def execute(args: argparse.Namespace, recording: Recording, device: torch.device, team: Team) -> None:
    """Record the states of all seeds that have no shard yet."""
    one_file = args.out.suffix in (".pt", ".pth")
    folder = args.out.with_name(f".{args.out.name}.parts") if one_file else args.out
    origin, record = recording.load(device)
    made_by = {key: value for key, value in recording.describe.items() if key not in ("config", "checkpoint")}
    provenance = origin | made_by | {"batch_size": args.batch_size, "n_samples": args.n_samples}
    indices = list(batches(FIRST_CALIBRATION_IMAGE, args.n_samples, args.batch_size))
    todo = team.broadcast(unfinished(folder, provenance, indices) if team.leads else None)
    start_log(folder, args.verbose, team.rank)
    for batch, part in record(list(todo), team):
        save_shard(part, shard_path(folder, todo[batch]), provenance)
        logger.info("%s: %d samples, %d steps", shard_path(folder, todo[batch]).name, part.samples, part.steps)
    team.wait()
    if not team.leads:
        return
    if one_file:
        save_pickle(original_layout(load_trajectories(folder)), args.out)
        shutil.rmtree(folder)
    print(f"{args.out}: {args.n_samples} samples of {recording.steps} steps")


def unfinished(folder: Path, provenance: dict, indices: list[range]) -> dict[range, int]:
    """The batches that have no shard yet, with their shard number.

    Raises ValueError naming a shard that was made with other settings, and the first that differs.
    """
    todo = {}
    for position, batch in enumerate(indices):
        path = shard_path(folder, position)
        if not path.exists():
            todo[batch] = position
            continue
        found = shard_provenance(path)
        for key, value in provenance.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{path}: made with {key} {found.get(key)!r}, this run has {value!r}; choose another --out"
                )
    return todo


if __name__ == "__main__":
    run_main(main, GOES_ON)
