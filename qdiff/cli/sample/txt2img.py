"""Calibrate a text-to-image model (Stable Diffusion), or load a calibrated one, and sample images of prompts.

Takes the command lines of the Q-Diffusion repository. Writes <outdir>/<date-time>/ with samples/00000.png, ...,
grid-0000.png, sampling_config.yaml, run.log and after a calibration ckpt.safetensors (packed) and ckpt.pth (the
original's format). The same command goes on with a run that was interrupted.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qdiff.cli.flags import add_run_flags, add_runtime_flags, add_team_flags, check_runtime_flags
from qdiff.cli.models.any_family import FLAGS
from qdiff.cli.models.conditioning import read_prompts
from qdiff.cli.parser import make_parser, number, whole
from qdiff.cli.quantize import plan_quantization
from qdiff.cli.recipe_flags import add_quantization_flags
from qdiff.cli.runs.run import RunPlan, execute
from qdiff.cli.team import start_team
from qdiff.families.ldm.conditioning import check_prompt
from qdiff.families.ldm.source import LatentSource, downsampling, find_checkpoint
from qdiff.families.open import latent_model
from qdiff.families.options import SamplingOptions
from qdiff.utils.devices import choose_device
from qdiff.utils.errors import flags_named
from qdiff.utils.images import load_png, save_png

CONFIG = Path("configs/stable-diffusion/v1-inference.yaml")
CKPT = Path("models/ldm/stable-diffusion-v1/model.ckpt")
# What --laion400m stands for.
LAION_CONFIG = Path("configs/latent-diffusion/txt2img-1p4B-eval.yaml")
LAION_CKPT = Path("models/ldm/text2img-large/model.ckpt")
OUTDIR, LAION_OUTDIR = Path("outputs/txt2img-samples"), Path("outputs/txt2img-samples-laion400m")
PROMPT = "a painting of a virus monster playing guitar"  # the original's
GRID_ROWS = 20  # of one grid; more images make more grids


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("model")
    group.add_argument("--config", type=Path, help=f"configuration (default: the one beside --ckpt, or {CONFIG})")
    group.add_argument("--ckpt", type=Path, default=CKPT, help="checkpoint, or the folder it lies in")
    group.add_argument("--laion400m", action="store_true", help=f"the LAION-400M model: {LAION_CONFIG}, {LAION_CKPT}")
    group.add_argument("--no_grad_ckpt", action="store_true", help="no activation checkpointing in the U-Net")
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", help=f"what to show (default: {PROMPT})")
    group.add_argument("--from-file", type=Path, metavar="FILE", help="a prompt per line, instead of --prompt")
    group.add_argument("--cali_prompts", type=Path, metavar="FILE", help="prompts that calibrate (default: the above)")
    group.add_argument("--cond", action="store_true", help="no effect: the model is always conditioned on its prompt")
    group = parser.add_argument_group("sampling")
    group.add_argument("--ddim_steps", type=whole(1), default=50, help="sampler steps, also of other samplers")
    group.add_argument("--plms", action="store_true", help="PLMS instead of DDIM")
    group.add_argument("--dpm", action="store_true", help="DPM-Solver++ instead of DDIM")
    group.add_argument("--ddim_eta", type=number(0, 1), default=0.0, help="share of DDPM noise, 0 (DDIM) to 1")
    group.add_argument("--scale", type=number(0, 100), default=7.5, help="guidance scale, 1 for none")
    group.add_argument("--fixed_code", action="store_true", help="all batches start from the same noise")
    group.add_argument("--n_iter", type=whole(1), default=2, help="times that the prompts are sampled")
    group.add_argument("--n_samples", type=whole(1), default=3, help="images at once; of --prompt, images each time")
    own = "(default: the model's own, for Stable Diffusion"
    group.add_argument("--H", type=whole(1), help=f"height in pixels {own} 512)")
    group.add_argument("--W", type=whole(1), help=f"width in pixels {own} 512)")
    group.add_argument("--C", type=whole(1), help=f"channels of latents {own} 4)")
    group.add_argument("--f", type=whole(1), help=f"pixels per latent along an axis {own} 8)")
    group.add_argument("--precision", choices=("autocast", "full"), default="autocast", help="half precision on GPUs")
    group = parser.add_argument_group("output")
    group.add_argument("--outdir", type=Path, default=OUTDIR, help="output folder")
    group.add_argument("--skip_grid", action="store_true", help="no grid of all images")
    group.add_argument("--skip_save", action="store_true", help="keep only the grid, not each image")
    group.add_argument("--n_rows", type=whole(0), default=0, help="images in a row of the grid (0: --n_samples)")
    add_quantization_flags(parser)
    parser.set_defaults(features=None, no_images=False)  # of txt2img images are wanted, and nothing else
    add_runtime_flags(parser)
    add_run_flags(parser, seed=42)
    add_team_flags(parser)
    parser.set_defaults(family="text")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError naming flags that are at odds; fill in the prompt, and what --laion400m stands for."""
    if args.prompt is not None and args.from_file is not None:
        raise ValueError("--prompt, --from-file: give one of them")
    if args.prompt is None and args.from_file is None:
        args.prompt = PROMPT
    if args.plms and args.dpm:
        raise ValueError("--plms, --dpm: each names a sampler; give one of them")
    if (args.plms or args.dpm) and args.ddim_eta:
        name = "PLMS" if args.plms else "DPM-Solver++"
        raise ValueError(f"--ddim_eta {args.ddim_eta:g}: {name} adds no noise, so it must be 0")
    if args.prompt is not None:
        check_prompt(args.prompt, "--prompt")
    if args.skip_grid and args.skip_save:
        raise ValueError("--skip_grid, --skip_save: nothing would be written; give one of them")
    if args.laion400m:
        args.config, args.ckpt = LAION_CONFIG, LAION_CKPT
        args.outdir = LAION_OUTDIR if args.outdir == OUTDIR else args.outdir


def read_model(args: argparse.Namespace) -> LatentSource:
    """The model that the flags name. Raises ValueError for one that takes no prompts, or has other --C or --f."""
    beside = find_checkpoint(args.ckpt).with_name("config.yaml")
    path = args.config or (beside if beside.is_file() else CONFIG)
    source = latent_model(args.ckpt, path)
    if source.kind != "text":
        raise ValueError(f"{path}: expected a text-to-image model; scripts/sample_diffusion_ldm.py samples this one")
    for flag, own in (("C", source.config.model.params.channels), ("f", downsampling(source.config))):
        given = getattr(args, flag)
        if given not in (None, own):
            raise ValueError(f"--{flag} {given}: the model has {own}")
    if args.no_grad_ckpt:
        source.config.model.params.unet_config.params.use_checkpoint = False
    return source


def make_plan(args: argparse.Namespace) -> RunPlan:
    """Check the flags and turn them into a plan. Raises ValueError naming the flag at fault."""
    check_args(args)
    source = read_model(args)
    sampler = "plms" if args.plms else "dpm_solver" if args.dpm else "ddim"
    prompts = [args.prompt] * args.n_samples if args.from_file is None else read_prompts(args.from_file, "--from-file")
    calibrating = prompts if args.cali_prompts is None else read_prompts(args.cali_prompts, "--cali_prompts")
    options = SamplingOptions(
        steps=args.ddim_steps,
        sampler=sampler,
        eta=args.ddim_eta if sampler == "ddim" else 0.0,
        scale=args.scale,
        seed=args.seed,
        height=args.H,
        width=args.W,
        prompts=tuple(calibrating),
    )
    with flags_named(FLAGS | {"steps": "--ddim_steps"}):
        sampling = source.sampling(options)
    quantization = plan_quantization(args, sampling.steps, f"--ddim_steps {args.ddim_steps}")
    device = choose_device(args.device)
    check_runtime_flags(args, device)
    return RunPlan(
        args,
        source,
        replace(sampling, entries=tuple(prompts * args.n_iter)),
        sampling,
        device,
        quantization,
        args.outdir,
        images=args.n_iter * len(prompts),
        batch_size=args.n_samples,
        picture="samples/{:05d}.png",
        fixed_code=args.fixed_code,
        autocast=args.precision == "autocast",
    )


@dataclass(frozen=True)
class Grids:
    """Grids of a run's images in their order."""

    plan: RunPlan
    columns: int

    def paths(self, folder: Path) -> list[Path]:
        """Where they lie."""
        count = math.ceil(self.plan.images / (self.columns * GRID_ROWS))
        return [folder / f"grid-{number:04d}.png" for number in range(count)]

    def write(self, folder: Path) -> None:
        """Write them from the images' files."""
        from torchvision.utils import make_grid  # takes seconds, which --help and --skip_grid can do without

        images = self.plan.paths(folder)
        size = self.columns * GRID_ROWS
        for k, path in enumerate(self.paths(folder)):
            chosen = [load_png(image) for image in images[k * size : (k + 1) * size]]
            save_png(make_grid(torch.stack(chosen), nrow=self.columns), path)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    plan = make_plan(args)
    grids = Grids(plan, args.n_rows or args.n_samples)

    def wanted(folder: Path) -> list[Path]:
        return plan.paths(folder) * (not args.skip_save) + grids.paths(folder) * (not args.skip_grid)

    with start_team(args, plan.device) as team:
        folder = execute(plan, team, wanted)
        if folder is None or not team.is_main:
            return
        if not args.skip_grid:
            grids.write(folder)
            print(*grids.paths(folder)[:4])
        if args.skip_save:
            shutil.rmtree(plan.path_of(folder, 0).parent)
