"""What the sampling scripts share: batches of image indices, progress, and runs that go on where they stopped."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from tqdm import tqdm

from qdiff.api.sampling import ALONE
from qdiff.calibration.resume import differences
from qdiff.cli.command import new_folder
from qdiff.cli.quantize import RECORD_NAME
from qdiff.deploy.runtime import prepare
from qdiff.evaluation.runs import CONFIG_NAME
from qdiff.families import Adapter
from qdiff.families.diffusion import cumulative_alphas
from qdiff.utils.atomic import remove_leftovers
from qdiff.utils.files import sole_user, write_text
from qdiff.utils.team import Team

logger = logging.getLogger(__name__)


def warn_of_start(pipeline: Any) -> None:
    """Say it where the first step's timestep is one of nearly clean images, as the only step of most samplers is.

    pipeline: of `ddim.pipeline` or `ldm.pipeline`.
    """
    first = int(pipeline.timesteps()[0])
    signal = cumulative_alphas(pipeline.betas)[first].item()  # of the variance; sampling starts from noise alone
    if signal > 0.5 and first < len(pipeline.betas) - 1:  # more steps would start at a noisier one
        wanted = f"where the network takes images with {100 * (1 - signal):.2g} % of noise"
        logger.warning("sampling starts from noise at timestep %d, %s: expect noise, or take more steps", first, wanted)


def describe_runtime(args: argparse.Namespace) -> dict[str, str]:
    """Plain data that say how the network computes; for --dry_run, and to know a run again."""
    return {"runtime": args.runtime} | ({"prefer": args.prefer} if args.runtime == "auto" else {})


def prepared(
    network: nn.Module, adapter: Adapter, args: argparse.Namespace, device: torch.device, team: Team = ALONE
) -> nn.Module:
    """The network, float or calibrated, as --runtime and --prefer have it run on the device."""

    def report(line: str) -> None:
        logger.info(line)
        if team.is_main:
            tqdm.write(line)  # it is known at the first call, when a progress bar is on the screen

    logger.info("runtime: %s", args.runtime)
    return prepare(network, adapter, args.runtime, device=device, prefer=args.prefer, report=report)


@contextmanager
def open_run(
    parent: Path,
    description: dict[str, Any],
    wanted: Callable[[Path], list[Path]],
    must_continue: bool = False,
    team: Team = ALONE,
) -> Iterator[tuple[Path, bool]]:
    """(folder of this run, whether it was begun earlier); within the block no other process works in the folder.

    The newest folder in `parent` whose description is the same and in which files that are `wanted` are missing is
    gone on with; else a new one is made, named after date and time, or ValueError raised with what differs where the
    run must be continued. The description is kept as sampling_config.yaml. Of a team the leading process decides;
    raises FileNotFoundError where another one does not see the folder, ValueError where another run is at work in it.
    """
    with ExitStack() as locks:
        found = _open_run(parent, description, wanted, must_continue, locks) if team.is_main else None
        folder, continued = team.broadcast(found)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: not seen by process {team.rank}; machines must share the output folder")
        yield folder, continued


def _open_run(
    parent: Path,
    description: dict[str, Any],
    wanted: Callable[[Path], list[Path]],
    must_continue: bool,
    locks: ExitStack,
) -> tuple[Path, bool]:
    text = yaml.safe_dump(description, sort_keys=False, width=100, allow_unicode=True)
    runs = sorted(parent.glob(f"*/{CONFIG_NAME}"), reverse=True)
    for config in runs:
        same = config.read_text(encoding="utf8") == text
        if same and not all(path.exists() for path in wanted(config.parent)):
            locks.enter_context(sole_user(config.parent))
            remove_leftovers(config.parent)
            return config.parent, True
    if must_continue:
        raise ValueError(f"--resume_calibration: {_why_not(parent, runs, text)}")
    folder = new_folder(parent)
    locks.enter_context(sole_user(folder))  # before the description shows it to others
    write_text(folder / CONFIG_NAME, text)
    return folder, False


def _why_not(parent: Path, runs: Sequence[Path], text: str) -> str:
    """Why no run in `parent` can be gone on with."""
    unfinished = [config.parent for config in runs if (config.parent / RECORD_NAME).is_dir()]
    if not unfinished:
        return f"{parent} holds no unfinished run"
    found = yaml.safe_load((unfinished[0] / CONFIG_NAME).read_text(encoding="utf8"))
    return f"{unfinished[0]} is of another plan: {differences(found, yaml.safe_load(text))}"


def missing_batches(
    indices: Sequence[range], files_of: Callable[[range], list[Path]], team: Team = ALONE
) -> list[range]:
    """The batches of which a file is not there yet: whole ones, so that images do not depend on interruptions.

    Of a team the leading process looks, before any of them writes.
    """
    missing = [batch for batch in indices if team.is_main and not all(path.exists() for path in files_of(batch))]
    return team.broadcast(missing)
