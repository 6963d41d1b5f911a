"""Calibrate a latent diffusion model (LSUN, ImageNet), or load a calibrated one, and sample images.

Takes the command lines of the Q-Diffusion repository. Writes <logdir>/samples/<date-time>/ with img/sample_000000.png,
..., numpy/<shape>-samples.npz, sampling_config.yaml, run.log and after a calibration ckpt.safetensors (packed) and
ckpt.pth (the original's format). The same command goes on with a run that was interrupted.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from ddim.files import atomic
from ddim.images import load_png
from ldm.pretrained import find_checkpoint, find_config
from qdiff.cli.commandline import (
    add_quantization_flags,
    add_run_flags,
    add_runtime_flags,
    add_team_flags,
    check_runtime_flags,
    make_parser,
    number,
    whole,
)
from qdiff.cli.models.conditioning import class_labels, is_conditional, number_of_classes
from qdiff.cli.models.latent import LatentPlan, downsampling, execute, make_pipeline
from qdiff.cli.models.latent_config import read_config
from qdiff.cli.quantize import plan_quantization
from qdiff.cli.runs.outputs import add_kept_flags, check_kept_flags
from qdiff.utils.devices import choose_device
from qdiff.utils.fabric_team import start_team


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("model")
    group.add_argument(
        "-r", "--resume_base", type=Path, required=True, metavar="PATH", help="checkpoint, or the folder it lies in"
    )
    group.add_argument("--config", type=Path, default=None, help="model configuration (default: the one beside it)")
    group.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of the configuration to replace")
    group = parser.add_argument_group("sampling")
    group.add_argument("-c", "--custom_steps", type=whole(1), default=50, help="sampler steps")
    group.add_argument("-e", "--eta", type=number(0, 1), default=1.0, help="share of DDPM noise, 0 (DDIM) to 1")
    group.add_argument("-v", "--vanilla_sample", action="store_true", help="ancestral sampling over all timesteps")
    group.add_argument("--dpm", action="store_true", help="DPM-Solver++ instead of DDIM")
    group.add_argument("--batch_size", type=whole(1), default=10, help="images at once")
    group = parser.add_argument_group("classes")
    group.add_argument("--classes", nargs="+", metavar="LABEL", help="labels and ranges, as 0-9 25 (default: all)")
    group.add_argument("--samples_per_class", type=whole(1), help="images of each class, in place of --n_samples")
    group.add_argument("--scale", type=number(0, 100), default=1.0, help="guidance scale, 1 for none")
    group.add_argument("--uncond_class", type=int, help="the label of no class (default: the last one; -1: none)")
    group = parser.add_argument_group("output")
    group.add_argument("-n", "--n_samples", type=whole(1), default=50000, help="number of images")
    group.add_argument("-l", "--logdir", default="none", help="output folder; none means outputs/ldm")
    group.add_argument("--cond", action="store_true", help="no effect: conditional models are always conditioned")
    add_quantization_flags(parser)
    add_runtime_flags(parser)
    add_kept_flags(parser)
    add_run_flags(parser, seed=None)
    add_team_flags(parser)
    parser.set_defaults(family="latent")
    args = parser.parse_intermixed_args(argv)
    if args.vanilla_sample and args.dpm:
        raise ValueError("-v/--vanilla_sample, --dpm: each names a sampler; give one of them")
    return args


def asked_for(args: argparse.Namespace, config: DictConfig) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(label of every image, labels that calibrate, the label of no class); () for unconditional models."""
    if number_of_classes(config) is not None:
        labels, nothing = class_labels(args, config, args.scale)
        if args.samples_per_class is not None:
            return tuple(label for label in labels for _ in range(args.samples_per_class)), tuple(labels), nothing
        return tuple(labels[i % len(labels)] for i in range(args.n_samples)), tuple(labels), nothing
    if is_conditional(config):
        raise ValueError(f"-r {args.resume_base}: a text-to-image model, which scripts/txt2img.py samples")
    for flag in ("classes", "samples_per_class", "uncond_class"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag}: the model is not class-conditional")
    if args.scale != 1:
        raise ValueError(f"--scale {args.scale:g}: guidance needs a conditional model")
    return (), (), -1


def make_plan(args: argparse.Namespace) -> LatentPlan:
    """Check the flags and turn them into a plan. Raises ValueError naming the flag at fault."""
    checkpoint = find_checkpoint(args.resume_base)
    config = read_config(args.config or find_config(checkpoint), args.overrides)
    size = config.model.params.image_size
    sampler = "ddpm" if args.vanilla_sample else "dpm_solver" if args.dpm else "ddim"
    eta = args.eta if sampler == "ddim" else 0.0
    options = {"steps": args.custom_steps, "eta": eta, "scale": args.scale, "seed": args.seed}
    flag = f"--custom_steps {args.custom_steps}"
    pipeline = make_pipeline(config, (size, size), flag, sampler=sampler, **options)
    entries, calibration_entries, nothing = asked_for(args, config)
    quantization, device = plan_quantization(args, len(pipeline.timesteps()), flag), choose_device(args.device)
    check_runtime_flags(args, device)
    pixels = size * downsampling(config)
    check_kept_flags(args, (3, pixels, pixels))
    return LatentPlan(
        args,
        config,
        checkpoint,
        pipeline,
        device,
        quantization,
        Path("outputs/ldm" if args.logdir == "none" else args.logdir) / "samples",
        images=len(entries) or args.n_samples,
        batch_size=args.batch_size,
        picture="img/sample_{:06d}.png",
        entries=entries,
        calibration_entries=calibration_entries,
        nothing=nothing,
    )


def npz_shape(plan: LatentPlan) -> tuple[int, int, int, int]:
    """(N, H, W, C) of all images as one array."""
    size = plan.pipeline.shape[1] * downsampling(plan.config)
    return plan.images, size, size, 3


def npz_path(plan: LatentPlan, folder: Path) -> Path:
    """Where that array lies in the run's folder."""
    return folder / "numpy" / f"{'x'.join(map(str, npz_shape(plan)))}-samples.npz"


def write_npz(plan: LatentPlan, folder: Path) -> Path:
    """All images as one array of uint8, read back from their files so that memory stays small."""
    shape, path = npz_shape(plan), npz_path(plan, folder)
    entry = zipfile.ZipInfo("arr_0.npy")  # dated 1980, so that the same images give the same bytes
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    with (
        atomic(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open(entry, "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for image_path in plan.paths(folder):
            image = load_png(image_path).permute(1, 2, 0).numpy()
            file.write((image * 255).round().astype(np.uint8).tobytes())
    return path


def main(argv: Sequence[str] | None = None) -> None:
    plan = make_plan(parse_args(argv))
    with start_team(plan.args, plan.device) as team:
        array = not plan.args.no_images
        wanted = lambda folder: plan.kept(folder).all_files() + [npz_path(plan, folder)] * array  # noqa: E731
        folder = execute(plan, team, wanted)
        if folder is not None and team.leads and array:
            print(write_npz(plan, folder))
