"""The layouts in which people save state dicts: training checkpoints of several codes, averages beside weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)

AVERAGES = ("ema", "ema_state_dict", "ema_model", "model_ema", "params_ema", "ema_params")
WEIGHTS = ("state_dict", "model_state_dict", "model", "network", "net", "unet", "module", "params")
# Prefixes of all names of a state dict: of DataParallel, of torch.compile, of averages kept beside the model's weights.
PREFIXES = ("module.", "_orig_mod.", "ema_model.")
AVERAGED, ONLINE = "ema_model.", "online_model."  # beside one another, in the state dict of an object that averages
WITHIN = ("shadow", "shadow_params", "module", "state_dict", "model")  # where an entry may keep its state dict
DDIM_EMA = 4  # place of the averages in a checkpoint of the DDIM repository: [model, optimizer, epoch, step, ema]

# Names beside a weight that say that it is no float weight: scaled float8, bitsandbytes, quanto, torchao, GPTQ and AWQ,
# compressed-tensors, HQQ, ModelOpt, PyTorch's own quantized modules, and everything below a weight's or a quantizer's
# name, since no float model has tensors there.
QUANTIZED = re.compile(
    r"(?!.*\bparametrizations\.)(.+\.)?(scaled_fp8|comfy_quant|SCB|CB|weight_format|[wq]?scales|zero_point|zeros"
    r"|g_idx|qweight|qzeros|W_q"
    r"|(weight|input|output)_scale(_inv|_2)?|scale_(weight|input)|weight_(packed|shape|zero_point|g_idx)"
    r"|(weight|input|output)_amax|_amax|_?weight_?[:.].+|_weight_\w+|_packed_params\..+|\w+_quantizer(_\w+)?\..+)"
)


def find_state(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds, averages (EMA) rather than the weights they are made of.

    A line says what was taken where there was a choice, or a prefix was cut off. Raises ValueError for other contents,
    and for tensors that are not plain, dense and on the CPU.
    """
    taken, state = next(_states(content), ("", content))
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        _refuse(path, f"a {type(content).__name__}")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            _refuse(path, f"a dictionary of other objects, {name!r} is a {type(value).__name__}")
        if (reason := _strange(value)) is not None:
            raise ValueError(f"{path} is not a readable checkpoint: {name}: expected a plain tensor, found {reason}")
    names = plain_names(state, path, taken, _unnamed_averages(content, taken))
    return {name: state[stored].detach() for name, stored in names.items()}


def plain_names(stored: Iterable[str], path: Path, taken: str = "", left: str = "") -> dict[str, str]:
    """A state dict's names without a prefix of all of them -> the names in the file.

    A line says what was taken, a place in the file, where it is no plain state dict, and what was `left`.
    """
    names, cut = {name: name for name in stored}, ""
    if names and all(name.startswith((AVERAGED, ONLINE)) or "." not in name for name in names):
        averaged = {name: name for name in names if name.startswith(AVERAGED)}
        names = averaged or names
    while (prefix := next((p for p in PREFIXES if names and all(n.startswith(p) for n in names)), None)) is not None:
        names, cut = {name.removeprefix(prefix): inner for name, inner in names.items()}, cut + prefix
    if (taken and taken != "state_dict") or cut or left:
        of = f"its {taken}" if taken else "all"
        logger.warning("%s: %s taken, %d tensors%s%s", path, of, len(names), cut and f", {cut!r} cut off", left)
    return names


def _states(content: object) -> Iterator[tuple[str, Any]]:
    """(its place, a state dict), the preferred one first: an entry, or what is kept within one."""
    for place, name, entry in _candidates(content):
        inner = [(f"{name}.{key}", entry.get(key)) for key in WITHIN] if isinstance(entry, Mapping) else []
        yield from ((place.format(key), found) for key, found in (*inner, (name, entry)) if _is_state(found))


def _unnamed_averages(content: object, taken: str) -> str:
    """What to say where a file has averages that are no state dict, which are not taken."""
    held = [name for name in AVERAGES if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
    return f"; {held[0]!r} has no names and is not read" if held and "EMA" not in taken else ""


def _candidates(content: object) -> Iterator[tuple[str, str, Any]]:
    """(its place with {} for its name, its name, what may be a state dict), the preferred one first."""
    if isinstance(content, (list, tuple)):
        if len(content) > DDIM_EMA:
            yield "averages (EMA)", "", content[DDIM_EMA]
        if content:
            yield "first entry", "", content[0]
    if isinstance(content, Mapping):
        for name in (*AVERAGES, *WEIGHTS):
            yield ("averages {!r} (EMA)" if name in AVERAGES else "{}"), name, content.get(name)


def _is_state(content: object) -> bool:
    tensors = isinstance(content, Mapping) and [isinstance(value, Tensor) for value in content.values()]
    return bool(tensors) and any(tensors)


def _strange(value: Tensor) -> str | None:
    """What keeps a tensor from being a plain one whose values are in the file."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested one"
    if value.layout != _STRIDED:
        return f"a sparse one ({value.layout})"
    if value.is_quantized:
        return f"a quantized one ({value.dtype})"
    if not value.is_cpu:
        return f"one on the device {value.device}"
    held, spanned = value.untyped_storage().nbytes(), value.numel() * value.element_size()
    if spanned > held:
        return f"one of shape {list(value.shape)} that repeats the {held} bytes it has in the file"
    return None


_STRIDED = Tensor().layout


def _refuse(path: Path, kind: str) -> None:
    raise ValueError(f"{path} is not a readable checkpoint: expected a state dict of tensors, found {kind}")


def require_float_names(names: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError naming an entry that belongs to quantized weights, which a float model cannot take."""
    for name in names:
        if QUANTIZED.fullmatch(name):
            expected = "float weights; convert the checkpoint to float16 or float32 first"
            raise ValueError(f"{path}: {name} belongs to a quantized weight, expected {expected}")
