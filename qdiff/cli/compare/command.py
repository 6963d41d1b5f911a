"""Calibrate one model by several methods on the same float states and compare what they make of the same seeds.

Any model: pixel models by --config, latent models by -r. Every method at every bit width runs in a process of its own.
Writes report.html (all there is to see, in one file), comparison.png (rows: methods, columns: seeds), errors.png
(errors along the sampler's steps), results.json, results.md and one packed checkpoint per entry. A comparison that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qdiff.cli.command import print_plan, start_log
from qdiff.cli.compare.jobs import Job, leads_machines, run_jobs
from qdiff.cli.compare.parts import run_part
from qdiff.cli.compare.plan import DEFAULT_METHODS, FLOAT, LATENT_BATCH, Comparison, make_entries
from qdiff.cli.compare.report import write_report
from qdiff.cli.flags import add_run_flags, add_team_flags
from qdiff.cli.models.any_family import add_model_flags, choose_model
from qdiff.cli.parser import make_parser, whole
from qdiff.cli.runs.sampling import warn_of_start
from qdiff.cli.team import start_team
from qdiff.methods import METHODS
from qdiff.utils.atomic import remove_leftovers
from qdiff.utils.devices import choose_device
from qdiff.utils.files import sole_user

logger = logging.getLogger(__name__)
# Runs a part in its process; without the current folder on the path, where another qdiff may lie.
PART = "import sys; sys.path.pop(0); from qdiff.cli.main import run; run(['compare', *sys.argv[1:]])"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    add_model_flags(parser, timesteps=50, skip_type="quad")
    group = parser.add_argument_group("comparison")
    methods = f"of {', '.join(METHODS)}; iterations per unit where a method learns"
    default = f"(default: {' '.join(DEFAULT_METHODS)}; none beside --recipe)"
    group.add_argument("--methods", nargs="+", metavar="METHOD[:ITERATIONS]", help=f"{methods} {default}")
    group.add_argument("--recipe", type=Path, nargs="+", default=(), metavar="FILE", help="recipes (YAML), as they are")
    group.add_argument("--weight_bit", type=whole(2, 8), nargs="+", default=[4], help="bits of weights, one run each")
    bits = "bits of activations, one run each; 32 leaves them float"
    group.add_argument("--act_bit", type=whole(2, 32), nargs="+", default=[8], help=bits)
    group.add_argument("--sm_abit", type=whole(2, 16), default=8, help="bits of softmax outputs")
    group.add_argument("--a_sym", action="store_true", help="symmetric activations")
    group.add_argument("--split", action="store_true", help="split shortcuts fed by concatenated features")
    starts = "what learned rounding starts from"
    group.add_argument("--rounding_start", choices=("nearest", "gptq"), default="nearest", help=starts)
    group.add_argument("--cali_st", type=whole(1), default=10, help="sampler steps to calibrate on")
    group.add_argument("--cali_n", type=whole(1), default=16, help="samples of each of those steps")
    fields = "fields of the recipes to change, of all or of a method's, as quick:reconstruct.iterations=40"
    group.add_argument("--set", nargs="+", action="extend", metavar="[METHOD:]PATH=VALUE", help=fields)
    group.add_argument("--n_samples", type=whole(2), default=16, help="images to compare")
    followed = "of these, images whose states are compared at every step"
    group.add_argument("--n_errors", type=whole(1), default=16, help=followed)
    own = f"images sampled at once (default: the configuration's, for latent models {LATENT_BATCH})"
    group.add_argument("--batch_size", type=whole(1), help=own)
    group.add_argument("--outdir", type=Path, default=Path("outputs/comparison"), help="output folder")
    group.add_argument("--jobs", type=whole(1), default=1, help="runs side by side, as far as memory allows")
    group.add_argument("--only", help=argparse.SUPPRESS)  # one part, in this process
    add_run_flags(parser)
    add_team_flags(parser)
    return parser.parse_args(argv)


def make_comparison(args: argparse.Namespace) -> Comparison:
    """Check the flags and turn them into a plan. Raises ValueError naming the flag at fault."""
    if args.jobs > 1 and (args.num_nodes > 1 or "RANK" in os.environ):
        raise ValueError(f"--jobs {args.jobs}: several machines work on one run at a time; leave it out")
    model = choose_model(args)
    comparison = Comparison(args, model, make_entries(args, model.family), choose_device(args.device))
    comparison.check_recipes()
    return comparison


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    comparison = make_comparison(args)
    if args.dry_run:
        print_plan({**comparison.model.where, **comparison.plan()})
    elif args.only is None:
        orchestrate(comparison, sys.argv[1:] if argv is None else list(argv))
    else:
        run_alone(comparison, args.only)


def run_alone(comparison: Comparison, slug: str) -> None:
    """One part in this process; without bars where others run beside it."""
    args = comparison.args
    if slug != FLOAT:
        comparison.entry(slug)
    with start_team(args, comparison.device) as team:
        start_log(comparison.part(slug), args.verbose, team.rank)
        with contextlib.redirect_stderr(io.StringIO()) if args.jobs > 1 else contextlib.nullcontext():
            run_part(comparison, slug, team)


def orchestrate(comparison: Comparison, flags: list[str]) -> None:
    """Run what is not done yet, part by part in processes of their own, and write the results so far after each."""
    leads = leads_machines(comparison.args)
    digest = comparison.check_weights()
    start_log(comparison.folder, comparison.args.verbose, 0 if leads else 1)
    warn_of_start(comparison.model.pipeline)
    with sole_user(comparison.folder) if leads else contextlib.nullcontext():
        if leads:
            remove_leftovers(comparison.folder)
            comparison.settle(digest)
        run_all(comparison, flags, leads)


def run_all(comparison: Comparison, flags: list[str], leads: bool) -> None:
    """The parts that are not done yet. leads: whether this machine writes the results."""
    args, failed = comparison.args, []
    slugs = [entry.slug for entry in comparison.entries]
    todo = [slug for slug in slugs if comparison.result(slug) is None]

    def command(slug: str) -> list[str]:
        return [sys.executable, "-c", PART, *flags, "--only", slug]

    def largest() -> int:
        done = filter(None, map(comparison.result, (FLOAT, *slugs)))
        return args.devices * max((found["row"]["peak_memory_bytes"]["host"] for found in done), default=0)

    def done(job: Job) -> None:
        if job.process.returncode:
            failed.append(f"{job.slug}: {job.complaint}")
            if args.jobs > 1 and job.slug != FLOAT:
                logger.warning("%s", failed[-1])
        elif leads:
            write_report(comparison)

    if comparison.result(FLOAT) is None:
        run_jobs([FLOAT], command, 1, largest, done)
        if failed:
            raise ValueError(failed[0])
    run_jobs(todo, command, args.jobs, largest, done, first=1)
    if leads:
        about = comparison.result(FLOAT)["device"]
        print(f"\n{write_report(comparison)}\n\n{comparison.folder / 'comparison.png'}, on {about}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(slugs)} runs failed: {'; '.join(failed)}")
