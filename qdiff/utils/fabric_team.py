"""Teams of several processes, on one machine or on several, by Lightning Fabric."""

from __future__ import annotations

import _thread
import io
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qdiff.utils.errors import FieldError
from qdiff.utils.team import Team

POLL = 0.25  # seconds between two looks at the other processes
SILENCE = 600.0  # seconds after which a process that gives no sign of life counts as lost
GRACE = 5.0  # seconds that a process has to end by itself after another one has failed
BY_HAND = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")  # what Fabric needs where no launcher knows the machines


def start_team(device: torch.device, devices: int = 1, num_nodes: int = 1) -> Team:
    """A team of processes, `devices` on each of `num_nodes` machines, to be entered.

    device: the kind of device to work on. Under torchrun, Slurm and the like this process takes its place among those
    that were started; otherwise it starts the others on this machine with its own command line. Raises FieldError
    where the numbers do not fit the devices or the launcher.
    """
    size = devices * num_nodes

    def wrong(reason: str) -> FieldError:
        return FieldError("devices", f" {devices} {{}} {num_nodes}: {reason}", "num_nodes")

    if (started := int(os.environ.get("WORLD_SIZE", 1))) not in (1, size) and dist.is_torchelastic_launched():
        raise wrong(f"expected {started} processes in all, as many as torchrun has started")
    if size == 1:
        return Team()
    if device.index is not None:
        named = f" {device}: names one device, {{}} {devices} on {num_nodes} machines ask for {size}"
        raise FieldError("device", named, "devices")
    with without_torchmetrics():  # still takes a second to import
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import LightningEnvironment
        from lightning_fabric.utilities.exceptions import MisconfigurationException

    for name in ("lightning_fabric", "pytorch_lightning"):  # they announce what the user has asked for
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        fabric = Fabric(accelerator=device.type, devices=devices, num_nodes=num_nodes, strategy="ddp")
        by_hand = isinstance(fabric.strategy.cluster_environment, LightningEnvironment)
        if num_nodes > 1 and by_hand and not set(BY_HAND) <= os.environ.keys():
            raise ValueError(f"start it by torchrun or srun, or set {', '.join(BY_HAND)} on each machine")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack traces from processes that lose one another
        fabric.launch()
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise wrong(str(error).splitlines()[0]) from error
    if fabric.world_size != size:
        raise wrong(f"expected {size} processes, the launcher has started {fabric.world_size}")
    return FabricTeam(fabric)


@contextmanager
def without_torchmetrics() -> Iterator[None]:
    """Within the block torchmetrics is not there, unless it is loaded already.

    Lightning Fabric imports it for its version number alone (what needs it, spike detection, is not used here), and it
    imports torchvision and transformers: two thirds of the time that each process of a team takes to start.
    """
    if "torchmetrics" in sys.modules:
        yield
        return
    sys.modules["torchmetrics"] = None
    try:
        yield
    finally:
        del sys.modules["torchmetrics"]


class FabricTeam(Team):
    """One process of several. If another one fails, this one is ended too, quietly: see `_Watch`."""

    def __init__(self, fabric: Any) -> None:
        """fabric: a `lightning_fabric.Fabric` that was launched with a distributed strategy."""
        self.fabric, self.rank, self.size = fabric, fabric.global_rank, fabric.world_size
        self.device = fabric.device
        # Fabric kills a machine's processes without a word five seconds after one of them has failed. `_Watch` is
        # faster and says what has happened, so it takes the list that Fabric looks at.
        started = getattr(fabric.strategy.launcher, "procs", [])
        self._children: list[subprocess.Popen] = started[:]
        started.clear()
        self._store = _connect()
        self._waits = 0
        self._watch = _Watch(self._store, self.rank, self.size, self._children)
        self._watch.start()

    def __exit__(self, kind: type | None, error: BaseException | None, *trace: object) -> None:
        """Wait for the others. After an error: end them, or if another one failed first, end as it does."""
        if error is not None:
            self._fail(error)
            return
        try:
            self._finish()
        except BaseException as late:
            self._fail(late)
            raise

    def _fail(self, error: BaseException) -> None:
        code = self._watch.fail(_exit_code(error))
        if code is not None:
            raise SystemExit(code) from None
        sys.stderr.write("\n")  # after the bars, before the caller says what was wrong

    def _finish(self) -> None:
        self.wait()
        self._watch.stop()
        with suppress(RuntimeError):  # the process that keeps the store leaves last
            self._store.add("left", 1)
            while self.is_main and self._store.add("left", 0) < self.size:
                time.sleep(0.01)
        for child in self._children:
            child.wait()

    def sum(self, tensors: Sequence[Tensor]) -> None:
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.detach().flatten() for tensor in alike])
            with _connected():
                dist.all_reduce(flat)  # Fabric's own waits for all before and after, at three times the cost
            for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def broadcast(self, value: Any, owner: int = 0) -> Any:
        self.wait()  # which takes as long as it must: collective calls have a time limit
        sends, tensors = self.rank == owner, []
        about = (_without_tensors(value, tensors), [_form(tensor) for tensor in tensors]) if sends else None
        with _connected():
            data, forms = self.fabric.broadcast(about, owner)
            received = [self._send(tensors[i] if sends else None, *form, owner) for i, form in enumerate(forms)]
        return value if sends else _with_tensors(data, received)

    def _send(self, tensor: Tensor | None, shape: tuple, dtype: torch.dtype, on_cpu: bool, owner: int) -> Tensor:
        """One tensor from its owner, as bytes: not every backend knows every dtype. The owner gets its own back."""
        buffer = torch.empty(shape, dtype=dtype, device=self.device)
        if tensor is not None:
            buffer.copy_(tensor.detach())
        if buffer.numel():
            dist.broadcast(buffer.view(-1).view(torch.uint8), owner)
        if tensor is not None:
            return tensor
        return buffer.cpu() if on_cpu else buffer

    def wait(self) -> None:
        self._waits += 1
        key = f"wait/{self._waits}"
        with _connected():
            self._store.add(key, 1)
            while self._store.add(key, 0) < self.size:
                time.sleep(0.001)


def _connect() -> dist.Store:
    """A connection of our own to the store by which the processes have found one another."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with _connected():
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)
    # An elastic launcher that starts the processes again keeps its store.
    return dist.PrefixStore(f"team/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextmanager
def _connected() -> Iterator[None]:
    """Within the block a lost connection is an OSError, as it is elsewhere."""
    try:
        yield
    except RuntimeError as error:
        time.sleep(4 * POLL)  # in which `_Watch` ends this process, if it knows more
        raise ConnectionError("another process has ended unexpectedly") from error


def _form(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, bool]:
    return tuple(tensor.shape), tensor.dtype, tensor.device.type == "cpu"


def _without_tensors(value: Any, tensors: list[Tensor]) -> bytes:
    """The value as bytes. Its tensors are put into the list, each once wherever it stands."""
    places: dict[int, int] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> int | None:
            if not isinstance(part, Tensor):
                return None
            if id(part) not in places:
                places[id(part)] = len(tensors)
                tensors.append(part)
            return places[id(part)]

    buffer = io.BytesIO()
    Pickler(buffer).dump(value)
    return buffer.getvalue()


def _with_tensors(data: bytes, tensors: list[Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, place: int) -> Tensor:
            return tensors[place]

    return Unpickler(io.BytesIO(data)).load()


def _exit_code(error: BaseException) -> int:
    """What a script exits with after this error (see `qdiff.cli.command.run_main`)."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, (ValueError, OSError)) else 1


class _Watch(threading.Thread):
    """Ends this process when another one fails, so that it does not wait for that one forever.

    A process that fails writes its exit code into the store; the first one to do so says what was wrong, the others
    end with its code. Of processes that vanish without a word the one that notices says so: the one that started it,
    the leading one after long silence, or process 1 if the leading one is gone, which on one machine keeps the store.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, children: Sequence[subprocess.Popen]) -> None:
        super().__init__(daemon=True, name="watch")
        self.store, self.rank, self.size, self.children = store, rank, size, children
        self._over, self._code = threading.Event(), None  # the code with which this thread ends the process
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> (signs of life, when the last one came)

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self.join()

    def fail(self, code: int) -> int | None:
        """This process fails: None if it is the first one, else what it should exit with."""
        self._over.set()
        found = self._first(code)
        _end_after(3 * GRACE, code if found is None else found)
        if found is None:
            deadline = time.monotonic() + GRACE
            with suppress(RuntimeError):  # until the others have seen it, so that they stay silent
                while self.store.add("seen", 0) < self.size - 1 and time.monotonic() < deadline:
                    time.sleep(0.01)
        else:
            self._see()
        return found

    def _first(self, code: int) -> int | None:
        """None for the first process that fails, to the others its code."""
        if self._code is not None:
            return self._code
        try:
            if self.store.add("failures", 1) == 1:
                self.store.set("failed", str(code))
                return None
            return int(self.store.get("failed"))
        except RuntimeError:  # the leading process is gone, and the store with it
            return None if self.rank == 1 else 1

    def _see(self) -> None:
        with suppress(RuntimeError):
            self.store.add("seen", 1)

    def run(self) -> None:
        while not self._over.wait(POLL):
            try:
                lost, failed = self._look(), self.store.check(["failed"])
            except RuntimeError:
                lost, failed = "the leading process has ended unexpectedly", False
            if (lost or failed) and not self._over.is_set():
                self._end(None if failed else lost)
                return

    def _look(self) -> str | None:
        """Give a sign of life and look for processes that are gone; what to say of one."""
        self.store.add(f"alive/{self.rank}", 1)
        for number, child in enumerate(self.children, start=self.rank + 1):
            if child.poll():
                return f"process {number} has ended unexpectedly with exit code {child.returncode}"
        now = time.monotonic()
        for rank in range(1, self.size) if self.rank == 0 else ():
            count = self.store.add(f"alive/{rank}", 0)
            if count != self._heard.get(rank, (None, now))[0]:
                self._heard[rank] = (count, now)
            elif now - self._heard[rank][1] > SILENCE:
                return f"process {rank} has given no sign of life for {SILENCE:g} seconds"
        return None

    def _end(self, lost: str | None) -> None:
        """End this process: by an interruption of what it does, then by force."""
        code = self._first(1)
        if code is None:
            print(f"\n{Path(sys.argv[0]).name}: error: {lost}", file=sys.stderr, flush=True)
            code = 1
        self._code = code
        self._see()
        _end_after(GRACE, code)
        _thread.interrupt_main()


def _end_after(seconds: float, code: int) -> None:
    """End this process by force unless it has ended by then: a call to the other processes may hang."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
