"""Checkpoint files read safely and lazily: names and shapes first, each tensor when it is asked for.

Nothing is unpickled freely: PyTorch's weights-only unpickler reads tensors and plain containers, and the few other
objects that PyTorch Lightning leaves in its checkpoints become harmless stand-ins (`_STAND_INS`).
"""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import safe_globals

from ddim.layouts import find_state, plain_names, require_float_names
from ddim.pickles import Unfit, check_held, check_unread, is_plain


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint file by name, on the CPU, each read when it is asked for; a context manager.

    Tensors of memory-mapped files (all but PyTorch's format before 1.6) hold no memory until their values are used,
    and stay valid after the file is closed.
    """

    def __init__(self, path: Path):
        self.path = path

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, without reading its values."""
        return self[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor, without reading its values."""
        return self[name].dtype

    def close(self) -> None:
        """Lets go of the file."""

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens a `.safetensors` file, or what torch saved: a state dict, or a training checkpoint (`ddim.layouts`).

    Raises FileNotFoundError, and ValueError for a damaged file, a file with other contents, or one that holds objects
    of a class that is not on the list, which it names; such an object is never made. Raises ValueError for quantized
    weights too, by the scales beside them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    checkpoint = _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickledFile(path)
    require_float_names(checkpoint, path)
    return checkpoint


# Types of weights. Others that PyTorch calls floating point are scales (float8_e8m0fnu) or packed (float4_e2m1fn_x2).
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
NARROW = (torch.float16, torch.bfloat16, *FLOAT8)
FLOATS = (torch.float32, torch.float64, *NARROW)


def require_float(name: str, value: Tensor, path: object, dtype: torch.dtype = torch.float32) -> None:
    """Raise ValueError naming the file and the tensor where a float parameter's value is of integers, or not finite.

    dtype: of the parameter, in which it must be finite too.
    """
    if value.dtype not in FLOATS:
        raise ValueError(f"{path}: {name}: expected floating-point numbers, found {str(value.dtype)[6:]}")
    if value.dtype in FLOAT8:
        value = value.float()  # float8 has few operators
    if value.numel() and not all(end.to(dtype).isfinite() for end in value.aminmax()):  # which takes no memory
        wrong = int((~value.isfinite()).sum())
        what = "NaN or infinite" if wrong else f"beyond {str(dtype)[6:]}"
        count = wrong or int((~value.to(dtype).isfinite()).sum())
        raise ValueError(f"{path}: {name}: expected finite numbers, found {count} of {value.numel()} {what}")


class _SafetensorsFile(Checkpoint):
    def __init__(self, path: Path):
        super().__init__(path)
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable checkpoint: {one_line(error)}") from None
        self._names = plain_names(self._file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._file.get_tensor(self._names[name])
        except SafetensorError as error:  # a type that PyTorch does not have
            raise ValueError(f"{self.path}: {name}: not a readable tensor: {one_line(error)}") from None

    def shape(self, name: str) -> torch.Size:
        if name not in self._names:
            raise KeyError(name)
        return torch.Size(self._file.get_slice(self._names[name]).get_shape())

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        self._file, self._names = None, {}


class _PickledFile(Checkpoint):
    def __init__(self, path: Path):
        super().__init__(path)
        self._state = find_state(_unpickle(path), path)
        try:
            check_held(self._state.values(), path)
        except Unfit as error:
            raise ValueError(f"{path} is not a readable checkpoint: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def close(self) -> None:
        self._state = {}


def _unpickle(path: Path) -> object:
    # Files older than torch 1.6 (the published DDPM weights among them) are no zip archives and cannot be mapped.
    mmap = zipfile.is_zipfile(path)
    allowed = {}
    try:
        check_unread(path, _is_known)
    except Unfit as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from None
    except Exception:  # what damaged bytes make of it, PyTorch's reader says below
        pass
    while True:
        try:
            with safe_globals([(stand_in, name) for name, stand_in in allowed.items()]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols, of no use to who reads the error below
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # a damaged pickle can raise nearly anything
            name = _refused(error)
            stand_in = _stand_in(name) if name else None
            if stand_in is None or name in allowed:
                reason = _foreign(name) if name else "truncated or not a PyTorch file"
                raise ValueError(f"{path} is not a readable checkpoint: {reason}") from None
            allowed[name] = stand_in


def _refused(error: Exception) -> str | None:
    """The class or function that a weights-only load refused, from PyTorch's message."""
    found = re.search(r"GLOBAL (.{1,200}?) (?:was not an allowed global|whose module)", str(error))
    return found[1] if found else None


class _Inert:
    """Stands in for an object of which nothing is needed: takes any arguments and state, and keeps none."""

    def __new__(cls, *arguments, **named):
        return super().__new__(cls)

    def __init__(self, *arguments, **named):
        pass

    def __setstate__(self, state):
        pass


class _NumpyType:
    """Stands in for `numpy.dtype`: numbers only, since numpy's own takes any state a file gives it."""

    def __init__(self, code: str, *flags):
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise pickle.UnpicklingError("expected the type of a number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple):
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


def _numpy_scalar(kind: _NumpyType, content: bytes) -> int | float | complex | bool:
    """Stands in for the function that makes numpy scalars: the plain Python number."""
    if not isinstance(kind, _NumpyType) or not isinstance(content, bytes) or len(content) != kind.dtype.itemsize:
        raise pickle.UnpicklingError("expected a number")
    return np.frombuffer(content, kind.dtype)[0].item()


# The only names outside PyTorch's own list that a file may mention: what they may be -> what is made instead.
_STAND_INS = {
    r"(pytorch_lightning|lightning\.pytorch)\.callbacks(\.\w+)+": _Inert,
    r"numpy\.(core|_core)\.multiarray\.scalar": _numpy_scalar,
    r"numpy\.dtype": _NumpyType,
    r"numpy\.dtypes\.\w+DType": _Inert,
}


def _is_known(name: str) -> bool:
    """Whether a name in a pickle, "module name", is one of PyTorch's, whose reader has a list of them, or has a
    stand-in. Not `bytearray`, which PyTorch's reader would make of any size. Raises Unfit for others."""
    dotted = name.replace(" ", ".")
    if is_plain(name) or dotted.startswith("torch.") or dotted in _BUILTIN or _stand_in(dotted) is not None:
        return True
    raise Unfit(_foreign(dotted))


def _foreign(name: str) -> str:
    return f"it holds an object of class {name}, expected tensors only"


_BUILTIN = ("__builtin__.set", "__builtin__.complex", "builtins.complex")


def _stand_in(name: str):
    return next((made for pattern, made in _STAND_INS.items() if re.fullmatch(pattern, name)), None)


def one_line(error: Exception) -> str:
    """The first line of an error's message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def first_names(names: list[str], count: int = 3) -> str:
    """The first few names of a list, for a message."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
