"""Calibrate a latent diffusion model (LSUN, ImageNet), or load a calibrated one, and sample images.

Takes the command lines of the Q-Diffusion repository. Writes <logdir>/samples/<date-time>/ with img/sample_000000.png,
..., numpy/<shape>-samples.npz, sampling_config.yaml, run.log and after a calibration ckpt.safetensors (packed) and
ckpt.pth (the original's format). The same command goes on with a run that was interrupted.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from qdiff.cli.flags import add_run_flags, add_runtime_flags, add_team_flags, check_runtime_flags
from qdiff.cli.models.any_family import FLAGS
from qdiff.cli.models.conditioning import class_labels
from qdiff.cli.parser import make_parser, number, whole
from qdiff.cli.quantize import plan_quantization
from qdiff.cli.recipe_flags import add_quantization_flags
from qdiff.cli.runs.outputs import KeptOptions, add_kept_flags, check_kept_flags
from qdiff.cli.runs.run import RunPlan, execute
from qdiff.cli.team import start_team
from qdiff.families.ldm.conditioning import is_conditional, number_of_classes
from qdiff.families.ldm.source import colours, downsampling
from qdiff.families.open import latent_model
from qdiff.families.options import SamplingOptions
from qdiff.utils.atomic import atomic
from qdiff.utils.devices import choose_device
from qdiff.utils.errors import flags_named
from qdiff.utils.images import load_png


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


def asked_for(args: argparse.Namespace, config: DictConfig) -> dict[str, Any]:
    """What the flags ask of a class-conditional model, as fields of `SamplingOptions`; nothing of an unconditional one.

    Raises ValueError naming a flag that the model does not have.
    """
    if number_of_classes(config) is not None:
        return {"scale": args.scale, **class_labels(args, config)}
    if is_conditional(config):
        raise ValueError(f"-r {args.resume_base}: a text-to-image model, which scripts/txt2img.py samples")
    for flag in ("classes", "samples_per_class", "uncond_class"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag}: the model is not class-conditional")
    if args.scale != 1:
        raise ValueError(f"--scale {args.scale:g}: guidance needs a conditional model")
    return {}


def make_plan(args: argparse.Namespace) -> RunPlan:
    """Check the flags and turn them into a plan. Raises ValueError naming the flag at fault."""
    source = latent_model(args.resume_base, args.config, args.overrides)
    sampler = "ddpm" if args.vanilla_sample else "dpm_solver" if args.dpm else "ddim"
    eta = args.eta if sampler == "ddim" else 0.0
    with flags_named(FLAGS | {"steps": "--custom_steps"}):
        asked = asked_for(args, source.config)
        options = SamplingOptions(steps=args.custom_steps, sampler=sampler, eta=eta, seed=args.seed, **asked)
        calibrating = source.sampling(options)
    labels = calibrating.entries
    if labels and args.samples_per_class is not None:
        entries = tuple(label for label in labels for _ in range(args.samples_per_class))
    else:
        entries = tuple(labels[i % len(labels)] for i in range(args.n_samples)) if labels else ()
    quantization = plan_quantization(args, calibrating.steps, f"--custom_steps {args.custom_steps}")
    device = choose_device(args.device)
    check_runtime_flags(args, device)
    pixels = calibrating.pipeline.shape[1] * downsampling(source.config)
    check_kept_flags(KeptOptions.of(args), (colours(source.config), pixels, pixels))
    return RunPlan(
        args,
        source,
        replace(calibrating, entries=entries),
        calibrating,
        device,
        quantization,
        Path("outputs/ldm" if args.logdir == "none" else args.logdir) / "samples",
        images=len(entries) or args.n_samples,
        batch_size=args.batch_size,
        picture="img/sample_{:06d}.png",
    )


def npz_shape(plan: RunPlan) -> tuple[int, int, int, int]:
    """(N, H, W, C) of all images as one array."""
    size = plan.pipeline.shape[1] * downsampling(plan.source.config)
    return plan.images, size, size, colours(plan.source.config)


def npz_path(plan: RunPlan, folder: Path) -> Path:
    """Where that array lies in the run's folder."""
    return folder / "numpy" / f"{'x'.join(map(str, npz_shape(plan)))}-samples.npz"


def write_npz(plan: RunPlan, folder: Path) -> Path:
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
        if folder is not None and team.is_main and array:
            print(write_npz(plan, folder))
