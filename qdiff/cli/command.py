"""What every command does around its work: its folder, its log, its plan, its errors."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from qdiff.cli.errors import told
from qdiff.recipes.recipe import Recipe

logger = logging.getLogger(__name__)


def new_folder(parent: Path) -> Path:
    """Create a folder named after date and time in `parent`, with a counter where another run has taken the name."""
    parent.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y-%m-%d-%H-%M-%S")
    folder, attempt = parent / name, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            attempt += 1
            folder = parent / f"{name}-{attempt}"


def printable(text: str, kept: str = "") -> str:
    """The text with control characters and others that do not print, apart from those `kept`, as escapes.

    Names that files hold reach people through messages; a terminal would obey what is in them.
    """
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


class PlainFormatter(logging.Formatter):
    """Lines of a log, with nothing in them that a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), kept="\n\t")


def start_log(folder: Path, verbose: bool, rank: int = 0) -> None:
    """Create the output folder and log into its run.log from here on. Raises OSError where it cannot be written.

    rank: of this process among several; those behind the first log into files of their own, and show errors only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"run.rank{rank}.log" if rank else "run.log"
    handlers = [logging.FileHandler(folder / name, encoding="utf8"), logging.StreamHandler(sys.stderr)]
    handlers[0].setLevel(logging.DEBUG if verbose else logging.INFO)
    handlers[1].setLevel(logging.ERROR if rank else logging.INFO if verbose else logging.WARNING)
    for handler in handlers:
        handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=handlers, force=True)
    logger.info("command: %s", " ".join(sys.argv))
    logger.info("torch %s, %d threads", torch.__version__, torch.get_num_threads())


def print_plan(plan: dict[str, Any], recipe: Recipe | None = None) -> None:
    """Show what a run would do, as YAML; a recipe under its own key can be saved and given back by --recipe."""
    plan = plan if recipe is None else plan | {"recipe": recipe.to_dict()}
    print(yaml.safe_dump(plan, sort_keys=False, width=100), end="")


GOES_ON = ": the same command goes on where it stopped"  # what a script says that can do so after Ctrl-C


def run_main(main: Callable[[Sequence[str] | None], None], interrupted: str = "") -> None:
    """Run a script's main; a user's mistake becomes one line on standard error and exit code 2.

    interrupted: what to add to the word "interrupted" after Ctrl-C, of which the exit code is 130.
    """
    if logging.lastResort is not None:  # it writes warnings from before the log is started
        logging.lastResort.setFormatter(PlainFormatter())
    try:
        main(None)
    except (ValueError, OSError) as error:
        if "--verbose" in sys.argv:
            logger.exception("failed")
        reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else told(error)
        sys.exit(_complain(" ".join(reason.split())))
    except KeyboardInterrupt:
        print(f"interrupted{interrupted}", file=sys.stderr)
        sys.exit(130)


def _complain(reason: str) -> int:
    """One line on standard error, and in run.log once there is one."""
    reason = printable(reason)
    if logging.getLogger().handlers:
        logger.error(reason)
    else:
        print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
    return 2
