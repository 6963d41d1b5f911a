"""Parts of a comparison as processes: so many side by side as are asked for and memory allows."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

POLL = 0.1  # seconds between two looks at the processes
GRACE = 10.0  # seconds that a process has to end after an interruption
SPARE = 1.2  # free memory that a further process needs, in peaks of the largest one so far
BAR = re.compile(r"\d+%\|")
WHERE = "/proc/meminfo"
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


def free_memory(path: str = WHERE) -> int | None:
    """Bytes that a new process can take without others having to give way; None where the system does not say."""
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def room_for_another(largest: int) -> bool:
    """Whether a process as large as the largest one so far, in bytes, fits beside those that run."""
    free = free_memory()
    return free is None or free > SPARE * largest


def child_environment(jobs: int, number: int = 0) -> dict[str, str]:
    """What the `number`-th process sees.

    Processes side by side share the cores, unless OMP_NUM_THREADS says how many threads each has. Under torchrun every
    process of a team starts its own; these meet at a port of their own, since torchrun's store remembers earlier ones.
    """
    found = dict(os.environ)
    if found.get(AGENT_STORE) == "True" and "MASTER_PORT" in found:
        found |= {AGENT_STORE: "False", "MASTER_PORT": str(int(found["MASTER_PORT"]) + 1 + number)}
    if jobs > 1 and "OMP_NUM_THREADS" not in found:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    if sys.stderr.isatty():  # bars are drawn for the terminal that they end up on
        found["COLUMNS"] = str(shutil.get_terminal_size().columns)
    return found


class Job:
    """One part in a process of its own. What it writes to standard error is shown, unless `quiet`; its last line is
    kept in any case."""

    def __init__(self, slug: str, command: Sequence[str], environment: dict[str, str], quiet: bool) -> None:
        self.slug, self.quiet = slug, quiet
        self._tail = b""
        # A session of its own, so that Ctrl-C reaches it once, and with it the processes that it starts.
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while chunk := os.read(self.process.stderr.fileno(), 1 << 16):
            self._tail = (self._tail + chunk)[-8192:]
            if not self.quiet:
                sys.stderr.write(chunk.decode("utf8", "replace"))
                sys.stderr.flush()

    def finished(self) -> bool:
        """Whether the process has ended."""
        if self.process.poll() is None:
            return False
        self._reader.join(timeout=1)
        return True

    @property
    def complaint(self) -> str:
        """Why it failed, in one line."""
        lines = [line.strip() for line in re.split(r"[\r\n]", self._tail.decode("utf8", "replace"))]
        said = [line for line in lines if line and not BAR.search(line)]
        if self.process.returncode < 0:
            with suppress(ValueError):
                return f"ended by {signal.Signals(-self.process.returncode).name}"
        return said[-1] if said else f"exit code {self.process.returncode}"

    def signal(self, number: int) -> None:
        """Send a signal to the process and to those that it has started."""
        self.quiet = True
        with suppress(OSError):
            os.killpg(self.process.pid, number)


def end_all(running: Sequence[Job]) -> None:
    """Interrupt processes and wait for them; by force if they do not end, or after another Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            for job in running:
                job.signal(number)
            for job in running:
                job.process.wait(GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue
        return


@contextmanager
def _ended_with(running: list[Job]) -> Iterator[None]:
    """Within the block an end of this process, by an error or a signal, ends the others too."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        end_all(running)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_jobs(
    todo: Sequence[str],
    command: Callable[[str], list[str]],
    jobs: int,
    largest: Callable[[], int],
    done: Callable[[Job], None],
    first: int = 0,
) -> None:
    """Run the parts `todo` in their order, at most `jobs` at once, and call `done` as each of them has ended.

    command: part -> its command line. largest: bytes at most taken by one that has ended. first: the number of the
    first one, of all that this process starts. With several at once one bar counts the parts that are done.
    """
    waiting, running, shown = list(enumerate(todo)), [], 0.0
    with (
        _ended_with(running),
        tqdm(total=len(todo), desc="comparison", unit="run", dynamic_ncols=True, disable=jobs == 1) as bar,
    ):
        while waiting or running:
            while waiting and len(running) < jobs and (not running or room_for_another(largest())):
                number, slug = waiting.pop(0)
                running.append(Job(slug, command(slug), child_environment(jobs, first + number), quiet=jobs > 1))
            ended = [job for job in running if job.finished()]
            for job in ended:
                running.remove(job)
                done(job)
                bar.update()
            if not ended:
                time.sleep(POLL)
                if time.monotonic() > shown + 1:  # so that the bar's clock goes on
                    bar.refresh()
                    shown = time.monotonic()


def leads_machines(args: argparse.Namespace) -> bool:
    """Whether this process, of those that a launcher has started on several machines, is the first one."""
    if args.devices * args.num_nodes == 1:
        return True
    ranks = [os.environ[name] for name in ("RANK", "SLURM_PROCID", "NODE_RANK") if name in os.environ]
    return not ranks or ranks[0] == "0"
