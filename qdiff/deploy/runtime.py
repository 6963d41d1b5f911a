"""One switch: from a calibrated network to the module that runs it, simulated or in integers."""

from __future__ import annotations

import importlib.util
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff.checkpoints.native import load_checkpoint
from qdiff.deploy.agreement import LIMIT, distances
from qdiff.deploy.convert import integer_network, is_integer, load_integer
from qdiff.deploy.deferred import ChosenAtFirstCall, Deferred, shown
from qdiff.deploy.times import RuntimeTimings, contents, signature, sizes_of
from qdiff.families import Adapter
from qdiff.nn.layers import QuantLayer
from qdiff.nn.unowned import Unowned
from qdiff.utils.errors import FieldError

logger = logging.getLogger(__name__)
RUNTIMES = ("simulate", "integer", "onnx", "auto")
PREFERENCES = ("speed", "memory")
Report = Callable[[str], None]
WARM_UP, REPEATS = 2, 3  # evaluations of each candidate before and while it is timed


def prepare(
    network: nn.Module,
    adapter: Adapter,
    runtime: str = "simulate",
    *,
    device: torch.device | str = "cpu",
    prefer: str = "speed",
    attention: str | None = None,
    report: Report | None = None,
) -> nn.Module:
    """The module that runs a calibrated network on a device, called as the network itself.

    "simulate": float arithmetic on the grids. "integer": products of codes, by fused kernels on a GPU, by the exact
    reference on a CPU (slow: for verification). "onnx": ONNX Runtime, on the CPU. "auto": on a CPU the fastest of those
    that give the simulation's numbers, on a GPU the fastest form of each layer, as measured at the first call; where
    `prefer` is "memory", the smallest. `report` is called with each measurement as text. attention: the policy of
    `qdiff.deploy.layers.IntegerAttention`, None for the one that the network's checkpoint records. The returned module
    does not need `network` afterwards; it may share its tensors.

    Raises ValueError for unknown names, for a runtime that the device or the installation does not have, and naming a
    layer that is not calibrated.
    """
    device = torch.device(device)
    check_runtime(runtime, device, prefer)
    if runtime == "simulate":
        if any(isinstance(m, QuantLayer) for m in network.modules()) or not _has_integers(network):
            return network.to(device)
        raise ValueError("runtime simulate: needs the float weights, which this network was loaded without")
    if runtime == "integer":
        return _integer(_as_integer(network, attention), adapter, device)
    if runtime == "onnx":
        return OnnxAtFirstCall(_as_integer(network, attention), adapter)
    if device.type != "cpu":
        return _chosen_kernels(network, adapter, device, prefer, attention, report or logger.info)
    if prefer == "memory":
        runtime = "onnx" if has_onnx_runtime() else "integer"
        return prepare(network, adapter, runtime, device=device, attention=attention)
    known_by = f"{signature(network)} attention {attention} {_onnx_form()}"
    candidates = _candidates(network, adapter, attention)
    return FastestAtFirstCall(candidates, RuntimeTimings(device), known_by, report or logger.info)


def load(
    path: str | Path,
    runtime: str = "simulate",
    *,
    device: torch.device | str = "cpu",
    prefer: str = "speed",
    attention: str | None = None,
    report: Report | None = None,
) -> nn.Module:
    """The network of a packed checkpoint, ready to run: network(x, t), or network(x, t, context).

    Arguments as for `prepare`; attention None is what the file records. Except to simulate, no float weights of the
    whole network are ever held. Raises FileNotFoundError, or ValueError naming the file or the runtime.
    """
    check_runtime(runtime, torch.device(device), prefer)
    if keeps_codes(runtime, prefer):
        found = load_integer(path, attention)
    else:
        found = load_checkpoint(path)
    options = {"device": device, "prefer": prefer, "attention": attention, "report": report}
    return prepare(found.network, found.adapter, runtime, **options)


def keeps_codes(runtime: str, prefer: str = "speed") -> bool:
    """Whether a runtime never asks for the float weights, so that a checkpoint is best loaded without them."""
    return runtime in ("integer", "onnx") or (runtime == "auto" and prefer == "memory")


def check_runtime(runtime: str, device: torch.device, prefer: str = "speed") -> None:
    """Raise FieldError where a runtime is unknown, or the device or the installation does not have it."""
    for what, found, known in (("runtime", runtime, RUNTIMES), ("prefer", prefer, PREFERENCES)):
        if found not in known:
            raise FieldError(what, f": expected one of {', '.join(known)}, found {found!r}")
    if runtime == "onnx":
        if device.type != "cpu":
            raise FieldError("runtime", f" onnx: runs on the CPU, found {device}; integer and auto run there")
        if not has_onnx_runtime():
            raise FieldError("runtime", " onnx: needs ONNX Runtime, found none: pip install '.[onnx]'")


def has_onnx_runtime() -> bool:
    """Whether the packages of the extra [onnx] are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime"))


def _onnx_form() -> str:
    """ONNX Runtime's version, and the form of graphs that it runs on this CPU."""
    if not has_onnx_runtime():
        return "no onnxruntime"
    from qdiff.deploy.onnx.weight_types import fastest_exact

    return f"onnxruntime {_onnx_runtime_version()} {fastest_exact()}"


def _onnx_runtime_version() -> str:
    import onnxruntime

    return onnxruntime.__version__


def _has_integers(network: nn.Module) -> bool:
    return any(hasattr(m, "packed") for m in network.modules())


def _as_integer(network: nn.Module, attention: str | None) -> nn.Module:
    if _has_integers(network) and is_integer(network):
        return network
    return integer_network(network, attention)


def _integer(network: nn.Module, adapter: Adapter, device: torch.device) -> nn.Module:
    if device.type == "cpu":
        return network
    from qdiff.deploy.kernels.convert import to_kernels

    return to_kernels(network.to(device), adapter)


def _chosen_kernels(
    network: nn.Module, adapter: Adapter, device: torch.device, prefer: str, attention: str | None, report: Report
) -> nn.Module:
    """Kernels, and plain 16-bit layers for shapes where these are faster."""
    network = _as_integer(network, attention).to(device)
    if prefer == "memory":
        return _integer(network, adapter, device)
    from qdiff.deploy.kernels.choose import FastestKernels

    return FastestKernels(network, adapter, report)


def _candidates(network: nn.Module, adapter: Adapter, attention: str | None) -> dict[str, nn.Module]:
    found = {"integer": network} if _has_integers(network) else {"simulate": network}
    if has_onnx_runtime():
        found["onnx"] = OnnxAtFirstCall(_as_integer(network, attention), adapter)
    return found


class OnnxAtFirstCall(Deferred):
    """A network run by ONNX Runtime; the graph is made for the sizes of the inputs, anew when they change."""

    def __init__(self, network: nn.Module, adapter: Adapter) -> None:
        super().__init__(network.step_table)
        self._network, self._adapter = Unowned(network), adapter
        self._sizes: tuple | None = None
        self._session: nn.Module | None = None

    @property
    def running(self) -> nn.Module | None:
        return self._session

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; t: [N]; context: what the network is conditioned on. Returns the predicted noise."""
        sizes = tuple(x.shape[1:]), None if context is None else tuple(context.shape[1:])
        if sizes != self._sizes:
            from qdiff.deploy.onnx.session import OnnxNetwork

            self._session = None  # one at a time in memory
            self._session = OnnxNetwork.of(self._network.module, self._adapter, *sizes)
            self._sizes = sizes
        return self._session(x, t) if context is None else self._session(x, t, context)


class FastestAtFirstCall(ChosenAtFirstCall):
    """The fastest of some candidates by what was measured on the first batch of its sizes that this machine has seen;
    the others are given up. The first candidate is what was calibrated: those that give other numbers are refused."""

    def __init__(self, candidates: dict[str, nn.Module], times: RuntimeTimings, network: str, report: Report) -> None:
        """network: what `times` know the network by."""
        super().__init__(next(iter(candidates.values())).step_table)
        self._candidates, self._times, self._network, self._report = candidates, times, network, report

    def choose(self, arguments: tuple[Tensor, ...]) -> nn.Module:
        candidates = self._agreeing(arguments)

        def measure() -> dict[str, float]:
            return {name: median_ms(lambda m=m: m(*arguments)) for name, m in candidates.items()}

        what = f"{' or '.join(candidates)} of {self._network} on {sizes_of(arguments)}"
        times, known = self._times.of(what, measure)
        best = min(times, key=times.get)
        self._report(f"runtime auto: {shown(times, len(arguments[0]), known)}; taking {best}")
        self._candidates = {}
        return candidates[best]

    def _agreeing(self, arguments: tuple[Tensor, ...]) -> dict[str, nn.Module]:
        """The candidates that give the first one's numbers; a line says which do not."""
        reference, *others = self._candidates
        if not others:
            return self._candidates
        what = f"distances of {', '.join(others)} from {reference} {contents(self._candidates[reference])}"
        key = f"{what} of {self._network} on {sizes_of(arguments)}"
        found, _ = self._times.of(key, lambda: distances(self._candidates, arguments))
        refused = [name for name in others if not found[name] <= found[LIMIT]]
        for name in refused:
            self._report(
                f"runtime auto: {name} is refused: its answer to the first batch differs from that of {reference} by "
                f"{found[name]:.1%}, expected at most {found[LIMIT]:.1%}"
            )
        return {name: module for name, module in self._candidates.items() if name not in refused}


def median_ms(run: Callable[[], object], warm_up: int = WARM_UP, repeats: int = REPEATS) -> float:
    """Median milliseconds of a call on the CPU."""
    times = []
    for _ in range(warm_up + repeats):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[warm_up:])
