"""Never slower: each distinct layer is timed against a plain 16-bit one on the device, and the faster one runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from qdiff.deploy.deferred import ChosenAtFirstCall, shown
from qdiff.deploy.kernels.convert import RUNS_FLOAT, RUNS_INTEGER, check_triton, shared_grid, to_kernels
from qdiff.deploy.layers import IntegerAttention, IntegerLayer
from qdiff.deploy.times import RuntimeTimings, signature, sizes_of
from qdiff.nn.family import Adapter
from qdiff.nn.unowned import Unowned

Timer = Callable[[Callable[[], object]], float]  # milliseconds of a run
Shapes = tuple[tuple[int, ...], ...]  # of a module's arguments


@dataclass(frozen=True)
class Choice:
    """What was measured of one kind of layer: milliseconds of both forms, and the names of the layers of that kind."""

    kind: str
    names: tuple[str, ...]
    integer_ms: float
    float_ms: float

    @property
    def chosen(self) -> str:
        """The faster form, "integer" or "float"."""
        return RUNS_INTEGER if self.integer_ms <= self.float_ms else RUNS_FLOAT

    def __str__(self) -> str:
        times = f"integer {self.integer_ms:.3f} ms, 16-bit {self.float_ms:.3f} ms"
        return f"{len(self.names)} x {self.kind}: {times}; taking {self.chosen}"


@torch.no_grad()
def choose(
    network: nn.Module,
    adapter: Adapter,
    arguments: tuple[Tensor, ...],
    dtype: torch.dtype,
    timer: Timer,
    times: RuntimeTimings,
) -> list[Choice]:
    """The times of the layers and attention products of an integer network at the sizes that `arguments` lead to.

    arguments: what the network is called with; times: what is known already, and keeps what is measured now. A layer
    behind a norm that may write codes is timed on codes; all readers of one norm are decided together, since it writes
    one thing. The network is left as it is.
    """
    check_triton()
    shapes = _shapes_of(network, arguments)
    coded = _readers_of_codes(network, adapter)
    measured: dict[tuple, dict[str, float]] = {}
    groups: dict[tuple, list[str]] = {}
    for names in _together(shapes, coded):
        modules = [network.get_submodule(name) for name in names]
        keys = tuple(_key(m, shapes[name], name in coded) for m, name in zip(modules, names, strict=True))
        for module, key, name in zip(modules, keys, names, strict=True):
            if key not in measured:
                measure = partial(_measure, module, shapes[name], name in coded, dtype, timer, network)
                measured[key], _ = times.of(f"{dtype} {key}", measure)
        groups.setdefault(keys, []).extend(names)
    return [_choice(keys, names, measured) for keys, names in groups.items()]


def _choice(keys: tuple, names: list[str], measured: dict[tuple, dict[str, float]]) -> Choice:
    integer_ms, float_ms = (sum(measured[key][form] for key in keys) for form in (RUNS_INTEGER, RUNS_FLOAT))
    return Choice(" + ".join(_words(key) for key in keys), tuple(names), integer_ms, float_ms)


def _readers_of_codes(network: nn.Module, adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """Layers whose norm may write their codes: name -> all that read that norm."""
    feeds = [feed for feed in adapter.norm_feeds(network) if shared_grid(network, feed) is not None]
    return {name: feed.layers for feed in feeds for name in feed.layers}


def _together(shapes: dict[str, Shapes], coded: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The names that have been called, in groups that are decided together."""
    return list(dict.fromkeys(coded.get(name, (name,)) for name in shapes))


def _key(module: nn.Module, shapes: Shapes, coded: bool) -> tuple:
    """What layers of one speed have in common."""
    if isinstance(module, IntegerAttention):
        return "attention", module.policy, module.w.spec.bits, shapes
    parts = tuple((p.shape, p.spec.bits, p.integer, bool(p.zero_point.any())) for p in module.parts)
    geometry = (module.stride, module.padding, module.dilation) if module.kind == "conv" else ()
    return module.kind, parts, geometry, coded, shapes


def _words(key: tuple) -> str:
    sizes = "x".join(map(str, key[-1][0]))
    if key[0] == "attention":
        return f"attention of {sizes} to {key[-1][1][-2]} keys"
    weights = " and ".join("x".join(map(str, part[0])) for part in key[1])
    return f"{key[0]} {weights} of {key[1][0][1]} bits on {sizes}"


def _measure(
    module: nn.Module, shapes: Shapes, coded: bool, dtype: torch.dtype, timer: Timer, network: nn.Module
) -> dict[str, float]:
    """Milliseconds of the kernels and of the plain form."""
    from qdiff.deploy.kernels.layers import KernelAttention, KernelLayer, PlainAttention, plain_layer

    device = network.step_table.lookup.device
    inputs = [_random(shape, dtype, device) for shape in shapes]
    if isinstance(module, IntegerAttention):
        kernel = KernelAttention(module, dtype)
        plain = PlainAttention(kernel)
    else:
        kernel = KernelLayer(module, dtype)
        plain = plain_layer(kernel)
    codes = [(8 * x).to(torch.int8) for x in inputs] if coded else inputs
    with _some_set(module.steps if isinstance(module, IntegerLayer) else module.q.steps, device):
        return {RUNS_INTEGER: timer(lambda: kernel(*codes)), RUNS_FLOAT: timer(lambda: plain(*inputs))}


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@contextmanager
def _some_set(steps: nn.Module, device: torch.device):
    """Any parameter set will do while a layer runs alone."""
    former, steps.index = steps.index, torch.zeros(1, dtype=torch.long, device=device)
    try:
        yield
    finally:
        steps.index = former


class _Probe(nn.Module):
    """Stands for a module: notes the shapes it is called with, and returns zeros of the output's shape."""

    def __init__(self, module: nn.Module, seen: Callable[[Shapes], None]) -> None:
        super().__init__()
        self._module, self._seen = Unowned(module), seen

    def forward(self, *args: Tensor) -> Tensor:
        self._seen(tuple(tuple(x.shape) for x in args))
        module, x = self._module.module, args[0]
        if isinstance(module, IntegerAttention):
            return x.new_zeros(*x.shape[:-1], args[2].shape[-1])
        outputs, kernel = module.parts[0].shape[0], module.parts[0].shape[2:]
        if module.kind == "linear":
            return x.new_zeros(*x.shape[:-1], outputs)
        sides = zip(x.shape[2:], kernel, module.stride, module.padding, module.dilation, strict=True)
        return x.new_zeros(len(x), outputs, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides))


def _shapes_of(network: nn.Module, arguments: tuple[Tensor, ...]) -> dict[str, Shapes]:
    """The argument shapes of every integer layer and attention product, by name, in the order of running."""
    found: dict[str, Shapes] = {}
    kinds = (IntegerLayer, IntegerAttention)
    modules = {name: m for name, m in network.named_modules() if isinstance(m, kinds)}
    try:
        for name, module in modules.items():
            network.set_submodule(name, _Probe(module, lambda shapes, name=name: found.setdefault(name, shapes)))
        network(*arguments)
    finally:
        for name, module in modules.items():
            network.set_submodule(name, module)
    return found


class FastestKernels(ChosenAtFirstCall):
    """An integer network that takes kernels, or plain 16-bit layers where these are faster, when the first batch shows
    its sizes. What has been put together so is then held against the plain 16-bit network, eager and compiled, and the
    fastest of the three runs; `report` hears a line per kind of layer, and one of the whole. The others are given up.
    What this machine has measured before is not measured again.
    """

    def __init__(
        self, network: nn.Module, adapter: Adapter, report: Callable[[str], None],
        dtype: torch.dtype = torch.float16, timer: Timer | None = None, compiler: Callable | None = torch.compile,
    ) -> None:  # fmt: skip
        """timer: None measures on the device; compiler: None leaves the compiled network out."""
        super().__init__(network.step_table)
        self._waiting: tuple | None = (network, adapter, report, dtype, timer, compiler)

    def choose(self, arguments: tuple[Tensor, ...]) -> nn.Module:
        network, adapter, report, dtype, timer, compiler = self._waiting
        if timer is None:
            from qdiff.deploy.kernels.tuning import on_device as timer
        times = RuntimeTimings(network.step_table.lookup.device)
        found = choose(network, adapter, arguments, dtype, timer, times)
        for choice in found:
            report(f"runtime auto: {choice}")
        candidates = _candidates(network, adapter, dtype, found, compiler)
        what = f"{' or '.join(candidates)} in {dtype} of {signature(network)} on {sizes_of(arguments)}"
        measured, known = times.of(what, lambda: _of_networks(candidates, arguments, timer, report))
        best = min(measured, key=measured.get)
        report(f"runtime auto: {shown(measured, len(arguments[0]), known)}; taking {best}")
        self._waiting = None
        return candidates[best]()


def _candidates(
    network: nn.Module, adapter: Adapter, dtype: torch.dtype, found: list[Choice], compiler: Callable | None
) -> dict[str, Callable[[], nn.Module]]:
    """What makes the networks that may run, each once. The given network is left as it is."""
    choices = {name: choice.chosen for choice in found for name in choice.names}

    def made(forms: dict[str, str]) -> nn.Module:
        return to_kernels(copy.deepcopy(network), adapter, dtype, forms)

    plain = cache(lambda: made(dict.fromkeys(choices, RUNS_FLOAT)))
    candidates = {"chosen layers": cache(lambda: made(choices)), "16-bit eager": plain}
    if compiler is not None:
        candidates["16-bit compiled"] = cache(lambda: compiler(plain()))
    return candidates


def _of_networks(
    candidates: dict[str, Callable[[], nn.Module]],
    arguments: tuple[Tensor, ...],
    timer: Timer,
    report: Callable[[str], None],
) -> dict[str, float]:
    times = {}
    for name, make in candidates.items():
        network = make()
        try:
            times[name] = timer(lambda network=network: network(*arguments))
        except RuntimeError as error:  # of a compiler that is not there
            report(f"runtime auto: {name}: does not run here: {str(error).splitlines()[0]}")
    return times
