"""An exported network as a module that is called like the network itself and runs in ONNX Runtime on the CPU.

Weights that this CPU does not multiply exactly as the model has them are stored otherwise before it runs
(`qdiff.deploy.onnx.weight_types`), so that every machine computes the same sums of codes.

Samples are independent, so a batch is cut into pieces that run side by side, each on one thread: nothing waits for
other threads between operators, and a piece's largest tensors fit the cache of its core. Batches smaller than the
number of threads run as one, on all threads.
"""

from __future__ import annotations

import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdiff.families import Adapter
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import StepGroups
from qdiff.utils.files import parse_json

KEPT_BYTES = 2**26  # of a model's constants; more is mapped from a file
PIECE_BYTES = 2**22  # of the widest layer's output: more costs more in caches than it saves in calls


class OnnxNetwork(nn.Module):
    """network(x, t[, context]) by ONNX Runtime; tensors on the CPU, the result in x's dtype.

    Like a network it has a parameter (without elements, float32), a `step_table` if the model has parameter sets, and
    it takes batches of mixed timesteps.
    """

    def __init__(self, model: str | Path | bytes, threads: int | None = None) -> None:
        """model: a file that `export_onnx` wrote, or its bytes; threads: None takes PyTorch's number.

        Raises FileNotFoundError, or ValueError without ONNX Runtime and for what is not such a model.
        """
        super().__init__()
        self._runtime = _onnx_runtime()
        if not isinstance(model, bytes) and not Path(model).is_file():
            raise FileNotFoundError(f"{model}: no such ONNX model")
        self.placeholder = nn.Parameter(torch.empty(0), requires_grad=False)
        self.threads = threads or torch.get_num_threads()
        self._model = model if isinstance(model, bytes) else str(model)
        self._folder: tempfile.TemporaryDirectory | None = None
        self._open: tuple[int, Any] | None = None
        self._pool = ThreadPoolExecutor(max(1, self.threads - 1))
        session = self._session(1)
        self._about = _read_about(session, model)
        if self.weight_type == "int8" and not _is_exact("int8"):
            session = self._open = None
            self._model, self._folder = _kept(_as_uint8(self._model))
            session = self._session(1)
            self._about = _read_about(session, model)
        self._inputs = {each.name: each.shape for each in session.get_inputs()}
        self.step_table = step_table(self._about["steps"])

    @classmethod
    def of(
        cls,
        network: nn.Module,
        adapter: Adapter,
        shape: tuple[int, ...],
        context_shape: tuple[int, ...] | None = None,
        threads: int | None = None,
    ) -> OnnxNetwork:
        """Of a calibrated network in memory; arguments and errors as for `export_onnx`."""
        _onnx_runtime()
        from qdiff.deploy.onnx.export import make_model
        from qdiff.deploy.onnx.weight_types import fastest_exact, with_uint8_weights

        model = make_model(network, adapter, shape, context_shape)
        if fastest_exact() == "uint8":
            with_uint8_weights(model)
        kept, folder = _kept(model)
        del model
        found = cls(kept, threads)
        found._folder = folder  # read again by sessions that are opened later
        return found

    @property
    def weight_type(self) -> str | None:
        """How the model that runs stores weights, "int8" or "uint8"; None for a portable one, which runs in floats."""
        return self._about.get("weights") if self._about["dialect"] == "runtime" else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model, which are those of its weights for the most part."""
        if isinstance(self._model, bytes):
            return len(self._model)
        return sum(file.stat().st_size for file in Path(self._model).parent.glob(f"{Path(self._model).name}*"))

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; t: [N]; context: as the network's. Raises ValueError for other sizes than the model's."""
        feed = {"x": x, "t": t} if context is None else {"x": x, "t": t, "context": context}
        self._check(feed)
        arrays = {
            name: value.detach()
            .to("cpu", torch.int64 if _is_label(value, name) else torch.float32)
            .contiguous()
            .numpy()
            for name, value in feed.items()
        }
        if "set" not in self._inputs:
            output = self._run(arrays)
        else:
            output = self._run_by_set(arrays, self.step_table.groups_of(t.detach().cpu()).numpy())
        return torch.from_numpy(output).to(x)

    def _check(self, feed: dict[str, Tensor]) -> None:
        expected = self._inputs.keys() - {"set"}
        if feed.keys() != expected:
            raise ValueError(f"the ONNX model takes {', '.join(sorted(expected))}, found {', '.join(sorted(feed))}")
        count = len(feed["x"])
        for name, value in feed.items():
            if list(value.shape) != [count, *self._inputs[name][1:]]:
                wanted = f"[{count}, {', '.join(map(str, self._inputs[name][1:]))}]".replace(", ]", "]")
                raise ValueError(f"the ONNX model takes {name} of shape {wanted}, found {list(value.shape)}")

    def _run_by_set(self, arrays: dict[str, np.ndarray], sets: np.ndarray) -> np.ndarray:
        """Samples of one parameter set run together; results come back in the batch's order."""
        found = np.unique(sets)
        if len(found) == 1:
            return self._run({**arrays, "set": np.array(found[0])})
        output = None
        for number in found:
            rows = np.flatnonzero(sets == number)
            part = self._run({name: array[rows] for name, array in arrays.items()} | {"set": np.array(number)})
            output = np.empty((len(sets), *part.shape[1:]), part.dtype) if output is None else output
            output[rows] = part
        return output

    def _run(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        count = len(arrays["x"])
        if count < self.threads or count == 1:
            return self._session(self.threads).run(None, arrays)[0]
        largest = max(1, PIECE_BYTES // (4 * self._about["widest"]))
        pieces = self.threads * -(-count // (self.threads * largest))
        edges = np.linspace(0, count, min(pieces, count) + 1).round().astype(int)
        session, outputs = self._session(1), [None] * (len(edges) - 1)
        left = deque(range(len(outputs)))

        def run() -> None:
            while True:
                try:
                    i = left.popleft()
                except IndexError:
                    return
                piece = slice(edges[i], edges[i + 1])
                feed = {name: array if array.ndim == 0 else array[piece] for name, array in arrays.items()}
                outputs[i] = session.run(None, feed)[0]

        others = [self._pool.submit(run) for _ in range(self.threads - 1)]
        run()  # a thread that waits instead leaves its core to one that has to be woken and moved there
        for other in others:
            other.result()
        return np.concatenate(outputs)

    def _session(self, threads: int) -> Any:
        """A session for operators on that many threads; one at a time is held, since each has the weights."""
        if self._open is None or self._open[0] != threads:
            self._open = None
            self._open = threads, self._new_session(threads)
        return self._open[1]

    def _new_session(self, threads: int) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        # A plan of all tensors saves a twentieth of a small network's time, and doubles what a large one's take.
        options.enable_mem_pattern = self.weight_bytes <= KEPT_BYTES
        # Layers are written as they are to run; what is dequantized at every call may be so once.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            return self._runtime.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a class of its own for every kind
            name = "these bytes" if isinstance(self._model, bytes) else self._model
            raise ValueError(f"{name}: not a readable ONNX model: {' '.join(str(error).split())}") from error


def _kept(model: Any) -> tuple[bytes | str, tempfile.TemporaryDirectory | None]:
    """A model (onnx.ModelProto) for sessions: its bytes, or a file where it is large, and the folder that holds it."""
    from qdiff.deploy.onnx.export import constant_bytes, write_model

    if constant_bytes(model) <= KEPT_BYTES:
        return model.SerializeToString(), None
    folder = tempfile.TemporaryDirectory(prefix="qdiff-onnx-")
    path = Path(folder.name) / "network.onnx"
    write_model(model, path, inline_bytes=0)
    return str(path), folder


def _is_exact(weight_type: str) -> bool:
    from qdiff.deploy.onnx.weight_types import is_exact

    return is_exact(weight_type)


def _as_uint8(model: bytes | str) -> Any:
    import onnx

    from qdiff.deploy.onnx.weight_types import with_uint8_weights

    return with_uint8_weights(onnx.load_model_from_string(model) if isinstance(model, bytes) else onnx.load(model))


def _is_label(value: Tensor, name: str) -> bool:
    return name == "context" and value.dim() == 1


def _onnx_runtime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise ValueError("runtime onnx: needs ONNX Runtime, found none: pip install '.[onnx]'") from error
    return onnxruntime


def _read_about(session: Any, model: str | Path | bytes) -> dict[str, Any]:
    name = "these bytes" if isinstance(model, bytes) else model
    about = session.get_modelmeta().custom_metadata_map.get("qdiff")
    if about is None:
        raise ValueError(f"{name}: expected a model of qdiff's ONNX export, found one without its metadata")
    try:
        about = parse_json(about)
    except ValueError as error:
        raise ValueError(f"{name}: its metadata cannot be read: {error}") from error
    if missing := [key for key in ("dialect", "steps") if not isinstance(about, dict) or key not in about]:
        raise ValueError(f"{name}: expected metadata of qdiff's ONNX export, found none of its {missing[0]}")
    if about["dialect"] == "runtime":
        about.setdefault("weights", "int8")  # files of version 0.1 do not say it
    return about


def step_table(plain: dict[str, Any] | None) -> StepTable | None:
    """From `export.steps_to_plain`; None stays None."""
    if plain is None:
        return None
    table = StepTable(len(plain["lookup"]), StepGroups())
    table.count = plain["count"]
    table.lookup.copy_(torch.tensor(plain["lookup"]))
    table.known = None if plain["known"] is None else torch.tensor(plain["known"], dtype=torch.float64)
    return table
