"""Measure images: folders, .npz files, or samples of a model; against a reference, and against the float model's.

FID, sFID, IS, KID, precision and recall (torch-fidelity), FD in the bundled CIFAR-10 features, PSNR, SSIM, LPIPS, CLIP
score, and whether the prompt's class is seen, with 95 % intervals. What lacks its weights or inputs is left out in one
line. --cost shows parameters, bytes, multiply-accumulates and bit operations. docs/protocol.md says what compares.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from torch_fidelity.registry import DATASETS_REGISTRY

from qdiff.cli.command import print_plan, start_log
from qdiff.cli.evaluate.cost import TABLE, costs, in_units, layers_csv
from qdiff.cli.evaluate.metrics import DRAWS, METRICS, REFERENCE, WIDE_DRAWS, Judge, MetricOptions, Subject
from qdiff.cli.evaluate.pairs import PAIRED, PROMPTED, Comparer
from qdiff.cli.evaluate.report import csv_lines, left_out_lines, rows_of, table_of, write_csv, write_json
from qdiff.cli.evaluate.samples import SamplingPlan, plan_sampling, sample_folders
from qdiff.cli.flags import add_run_flags, add_runtime_flags
from qdiff.cli.models.any_family import add_model_flags
from qdiff.cli.models.conditioning import read_prompts
from qdiff.cli.parser import make_parser, whole
from qdiff.evaluation.cache import Cache
from qdiff.evaluation.distances import FileStatistics, holds_statistics
from qdiff.evaluation.extractors import INCEPTION, VGG, fetch_weights, found_weights, too_few
from qdiff.evaluation.images import ARRAYS, Images, RegisteredImages, arrays_in, file_digest, open_images
from qdiff.evaluation.pairs import few, numbers_of
from qdiff.evaluation.runs import is_run, read_run_prompts
from qdiff.evaluation.table import markdown_table
from qdiff.utils.devices import choose_device
from qdiff.utils.measurement_cache import cache_folder

logger = logging.getLogger(__name__)
NAMES = (*METRICS, *PAIRED, *PROMPTED)
PROTOCOL = 50_000  # images of published FID, sFID and IS values
BUNDLED = "bundled"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    where = "folders of images, runs' folders, or .npz files of uint8 [N, H, W, 3]; none: sample the model"
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGES", help=where)
    add_evaluation_flags(parser)
    add_tool_flags(parser)
    add_output_flags(parser)
    add_model_flags(parser, timesteps=100, skip_type="quad")
    group = parser.add_argument_group("samples")
    group.add_argument("--cali_ckpt", type=Path, metavar="FILE", help="calibrated checkpoint (.safetensors)")
    group.add_argument("--max_images", type=whole(2), default=1000, help="number of images")
    group.add_argument("--sample_batch_size", type=whole(1), help="images sampled at once (default: the model's)")
    add_runtime_flags(parser)
    add_run_flags(parser)
    args = parser.parse_intermixed_args(argv)
    args.metrics = args.metrics or NAMES
    return args


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """What is measured, and against what."""
    group = parser.add_argument_group("evaluation")
    kinds = f"real images: a folder, an .npz of images or statistics, {BUNDLED}, or of {', '.join(DATASETS_REGISTRY)}"
    group.add_argument("--reference", metavar="REF", help=kinds)
    group.add_argument("--float", type=Path, metavar="PATH", help="the float model's images of the same seeds")
    known = f"of {', '.join(NAMES)} (default: all)"
    group.add_argument("--metrics", nargs="+", choices=NAMES, metavar="METRIC", help=known)
    group.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt per line, which images take in turn")
    draws = f"resamples for intervals, 0 for none (default: {DRAWS}, {WIDE_DRAWS} for Inception's features)"
    group.add_argument("--bootstrap", type=whole(0), metavar="N", help=draws)
    group.add_argument("--cost", action="store_true", help="what the model takes, instead of images")


def add_tool_flags(parser: argparse.ArgumentParser) -> None:
    """Weights, and torch-fidelity's options."""
    group = parser.add_argument_group("weights", "Without them, what takes them is left out.")
    cached = "(default: where torch-fidelity keeps them)"
    group.add_argument("--inception", type=Path, metavar="FILE", help=f"Inception weights, torch-fidelity's {cached}")
    group.add_argument("--vgg", type=Path, metavar="FILE", help=f"VGG16 weights, torchvision's {cached}")
    group.add_argument("--lpips", type=Path, metavar="DIR", help=f"folder with the two files of LPIPS {cached}")
    group.add_argument("--clip", type=Path, metavar="DIR", help="a CLIP model's folder, as transformers has it")
    group.add_argument("--download", action="store_true", help="let torch-fidelity fetch weights and data sets")
    group = parser.add_argument_group("torch-fidelity", "Its own defaults; batches change the last digits.")
    group.add_argument("--batch_size", type=whole(1), default=64, help="images through a feature network at once")
    group.add_argument("--isc_splits", type=whole(1), default=10, help="splits of IS")
    group.add_argument("--kid_subsets", type=whole(1), default=100, help="random subsets of KID")
    group.add_argument("--kid_subset_size", type=whole(2), default=1000, help="images in each")
    group.add_argument("--prc_neighborhood", type=whole(1), default=3, help="neighbours of precision and recall")
    group.add_argument("--datasets_root", type=Path, metavar="DIR", help="folder of its data sets")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Files that are written."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    written = "write results.json and results.csv here (default for samples of a model: outputs/evaluation)"
    group.add_argument("--outdir", type=Path, help=written)
    caches = "where features of references are kept, under a hash of their data (default: $QDIFF_CACHE, ~/.cache/qdiff)"
    group.add_argument("--cache", type=Path, metavar="DIR", help=caches)
    group.add_argument("--no_cache", action="store_true", help="keep none")


@dataclass(frozen=True)
class Plan:
    """What will be judged. sampling: None where images are given. prompts: what images take in turn, if anything."""

    args: argparse.Namespace
    device: torch.device
    sampling: SamplingPlan | None
    prompts: tuple[str, ...] | None

    def describe(self) -> dict[str, Any]:
        """Plain data for --dry_run."""
        args = self.args
        found = {"images": [str(path) for path in args.images], "metrics": list(args.metrics)}
        found |= {"reference": args.reference, "float": None if args.float is None else str(args.float)}
        if self.sampling is not None:
            found["sampling"] = self.sampling.describe(args.cali_ckpt) | {"folder": str(self.sampling.parent)}
        return found


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the flags. Raises ValueError naming the one at fault."""
    device = choose_device(args.device)
    for flag in ("inception", "vgg"):
        path = getattr(args, flag)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{flag} {path}: no such file")
    prompts = None if args.prompts is None else tuple(read_prompts(args.prompts, "--prompts"))
    named = args.config is not None or args.resume_base is not None
    if args.images and named:
        raise ValueError("IMAGES, --config, -r: give images, or a model to sample, not both")
    if not args.images and not named:
        raise ValueError("IMAGES: expected a folder or an .npz, or a model to sample by --config or -r; found neither")
    sampling = None
    if named:
        sampling = plan_sampling(args, args.outdir or Path("outputs/evaluation"), device)
    elif args.cali_ckpt is not None:
        raise ValueError(f"--cali_ckpt {args.cali_ckpt}: name its float model too, by --config or -r")
    return Plan(args, device, sampling, prompts)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.cost:
        show_cost(args)
        return
    plan = make_plan(args)
    if args.dry_run:
        print_plan(plan.describe())
        return
    outdir = args.outdir if plan.sampling is None else plan.sampling.parent
    if outdir is not None:
        start_log(outdir, args.verbose)
    fetch(args)
    content = evaluate(plan)
    if outdir is not None:
        write_json(outdir / "results.json", content)
        write_csv(outdir / "results.csv", csv_lines(content["scores"]))
    if args.json is not None:
        write_json(args.json, content)


def fetch(args: argparse.Namespace) -> None:
    """With --download, get the weights that are wanted and not there."""
    wanted = {METRICS[name].network for name in args.metrics if name in METRICS}
    for network, given in ((INCEPTION, args.inception), (VGG, args.vgg)):
        if args.download and network in wanted and given is None and found_weights(network) is None:
            fetch_weights(network)


def evaluate(plan: Plan) -> dict[str, Any]:
    """Judge all images, print the table, return what the files hold."""
    args = plan.args
    paths, floats, prompts = list(args.images), args.float, plan.prompts
    reference = open_reference(args)  # before anything is sampled
    if plan.sampling is not None:
        folder, sampled = sample_folders(plan.sampling)
        paths, floats, prompts = [folder], floats or sampled, prompts or plan.sampling.prompts
    float_images = None if floats is None else open_images(floats)
    cache = None if args.no_cache else Cache(args.cache or cache_folder())
    judge = Judge(MetricOptions.of(args), plan.device, reference, cache, images_beside(reference))
    comparer = Comparer(MetricOptions.of(args), plan.device)
    rows, left_out, digests = [], {}, {}
    for path, images in [(path, open_images(path)) for path in paths]:
        subject = Subject(images, float_images, prompts_of(path, images, prompts))
        scores, reasons = judge.scores(subject)
        more, further = comparer.scores(subject)
        for line in warnings_of(subject, reference, judge):
            logger.warning(line)
        rows += rows_of(str(path), len(images), scores + more)
        left_out[str(path)] = reasons | further
        digests[str(path)] = images.digest()
    if rows:
        print(table_of(rows))
    for line in left_out_lines(left_out):
        print(line)
    return {
        "torch_fidelity": torch_fidelity.__version__,
        "scores": rows,
        "left_out": left_out,
        "sha256": digests | origin_of(reference, float_images),
        "weights": judge.weights(),
    }


def open_reference(args: argparse.Namespace) -> Images | FileStatistics | None:
    """What --reference names; None for the bundled statistics and for none. Raises ValueError where it is nothing."""
    if args.reference in (None, BUNDLED):
        return None
    if args.reference in DATASETS_REGISTRY:
        return RegisteredImages(args.reference, args.datasets_root, args.download)
    path = Path(args.reference)
    if path.suffix == ".npz" and path.is_file() and holds_statistics(path):
        return fitting_statistics(args, path)
    return open_images(path)


def fitting_statistics(args: argparse.Namespace, path: Path) -> FileStatistics:
    """The statistics of a file. Raises ValueError where none of the chosen distances can take them, nor its images."""
    found = FileStatistics(path)
    chosen = [METRICS[name] for name in args.metrics if name in METRICS]
    chosen = [metric for metric in chosen if metric.against == REFERENCE and metric.kind == "frechet"]
    reasons = [found.unfit(metric.layer) for metric in chosen]
    if reasons and all(reasons) and images_beside(found) is None:
        names = ", ".join(metric.name for metric in chosen)
        raise ValueError(f"--reference {reasons[0]}, which --metrics {names} takes")
    return found


def images_beside(reference: Images | FileStatistics | None) -> Images | None:
    """The images of a file that holds statistics too, as ADM's reference files do; None without them."""
    if not isinstance(reference, FileStatistics) or not set(ARRAYS) & set(arrays_in(reference.path)):
        return None
    return open_images(reference.path)


def origin_of(reference: Images | FileStatistics | None, float_images: Images | None) -> dict[str, str]:
    """Hashes of what the numbers are taken against."""
    found = {}
    if reference is not None:
        found["reference"] = (
            file_digest(reference.path) if isinstance(reference, FileStatistics) else reference.digest()
        )
    if float_images is not None:
        found["float"] = float_images.digest()
    return found


def prompts_of(path: Path, images: Images, prompts: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """A prompt per image: the given ones in turn, or those of a run of txt2img.py.

    The images of a run take theirs by number, so that one that is missing leaves the others theirs.
    """
    numbers = (numbers_of(images.names) if is_run(path) else None) or range(len(images))
    if prompts is not None:
        return tuple(prompts[number % len(prompts)] for number in numbers)
    own = read_run_prompts(path)
    if own is None or max(numbers) >= len(own):
        return own  # too few are left out by count
    return tuple(own[number] for number in numbers)


def warnings_of(subject: Subject, reference: Images | FileStatistics | None, judge: Judge) -> list[str]:
    """What to know before the numbers are compared with others."""
    images, found = subject.images, []
    chosen = [METRICS[name] for name in judge.options.metrics if name in METRICS]
    networks = judge.weights()
    of_inception = [m.label for m in chosen if m.network == INCEPTION and m.kind in ("frechet", "score")]
    if INCEPTION in networks and of_inception and len(images) != PROTOCOL:
        compare = "they compare only with values of the same count"
        found.append(f"{images.name}: {len(images)} images; published FID, sFID and IS take {PROTOCOL}: {compare}")
    layers = dict.fromkeys(m.layer for m in chosen if m.kind == "frechet" and m.network in networks)
    if narrow := too_few(len(images), layers):
        names = ", ".join(m.label for m in chosen if m.kind == "frechet" and m.layer in narrow)
        found.append(f"{images.name}: {len(images)} images, fewer than features: {names} biased far upwards")
    if subject.reference is not None and len(subject.reference) != len(images):
        found.append(f"{images.name}: {len(images)} images, and {len(subject.reference)} float ones")
    if subject.reference is not None and set(PAIRED) & set(judge.options.metrics):
        found += unpaired(subject)
    if images.lossy or (isinstance(reference, Images) and reference.lossy):
        found.append(f"{images.name}: JPEG files; compression changes FID, and PNG files compare only with PNG files")
    return found


def unpaired(subject: Subject) -> list[str]:
    """A line per set of images and float images that has some without a partner, naming them."""
    images, reference, found = subject.images, subject.reference, []
    for one, indices in ((images, subject.pairs.alone), (reference, subject.pairs.unused)):
        if indices:
            names = few([one.names[index] for index in indices])
            found.append(f"{one.name}: without a partner of the same number or name: {names}")
    return found


def show_cost(args: argparse.Namespace) -> None:
    """Print what the model takes; write it where asked to."""
    if args.images:
        raise ValueError("--cost: takes a model by --config or -r, and no images")
    if args.device is not None:
        raise ValueError("--cost: computes nothing, so it needs no --device; scripts/benchmark.py run measures time")
    rows, cost = costs(args)
    print(markdown_table(in_units(rows), [column for column in TABLE if any(column[0] in row for row in rows)]))
    content = {"rows": rows, "layers": [dict(zip(*pair, strict=True)) for pair in _named(list(layers_csv(cost)))]}
    if args.outdir is not None:
        write_json(args.outdir / "cost.json", content)
        write_csv(args.outdir / "cost.csv", list(layers_csv(cost)))
    if args.json is not None:
        write_json(args.json, content)


def _named(lines: list[list[Any]]) -> list[tuple[list[Any], list[Any]]]:
    return [(lines[0], line) for line in lines[1:]]
