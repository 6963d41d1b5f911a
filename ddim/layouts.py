"""The layouts in which people save state dicts: training checkpoints of several codes, averages beside weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)

AVERAGES = ("ema", "ema_state_dict", "ema_model", "model_ema", "params_ema", "ema_params")
WEIGHTS = ("state_dict", "model_state_dict", "model", "network", "net", "unet", "module", "params")
# Prefixes of all names of a state dict: of DataParallel, of torch.compile, of averages kept beside the model's weights.
PREFIXES = ("module.", "_orig_mod.", "ema_model.")
DDIM_EMA = 4  # place of the averages in a checkpoint of the DDIM repository: [model, optimizer, epoch, step, ema]

# Names beside a weight that say that it is no float weight: scaled float8, bitsandbytes, quanto, torchao, GPTQ.
QUANTIZED = re.compile(
    r"(.+\.)?(scaled_fp8|weight_scale(_inv|_2)?|scale_weight|input_scale|scale_input|SCB|weight_format|qweight|qzeros"
    r"|g_idx|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|_data|_scale|_shift|scale"
    r"|zero_point))"
)


def find_state(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds, averages (EMA) rather than the weights they are made of.

    A line says what was taken where there was a choice, or a prefix was cut off. Raises ValueError for other contents,
    and for tensors that are not plain, dense and on the CPU.
    """
    taken, state = "", content
    for place, candidate in _candidates(content):
        found = _is_state(candidate)
        if found:
            taken, state = place, candidate
            break
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        _refuse(path, f"a {type(content).__name__}")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            _refuse(path, f"a dictionary of other objects, {name!r} is a {type(value).__name__}")
        if (reason := _strange(value)) is not None:
            raise ValueError(f"{path} is not a readable checkpoint: {name}: expected a plain tensor, found {reason}")
    state, prefix = _without_prefix(state)
    if (taken and taken != "state_dict") or prefix:
        of = f"its {taken}" if taken else "all"
        logger.warning("%s: %s taken, %d tensors%s", path, of, len(state), prefix and f", {prefix!r} cut off")
    return {name: value.detach() for name, value in state.items()}


def _candidates(content: object) -> Iterator[tuple[str, Any]]:
    """(its name, what may be a state dict), the preferred one first."""
    if isinstance(content, (list, tuple)):
        if len(content) > DDIM_EMA:
            yield "averages (EMA)", content[DDIM_EMA]
        if content:
            yield "first entry", content[0]
    if isinstance(content, Mapping):
        for name in (*AVERAGES, *WEIGHTS):
            yield (f"averages {name!r} (EMA)" if name in AVERAGES and name in content else name), content.get(name)


def _is_state(content: object) -> bool:
    tensors = isinstance(content, Mapping) and [isinstance(value, Tensor) for value in content.values()]
    return bool(tensors) and any(tensors)


def _without_prefix(state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], str]:
    """The state dict with a prefix of all its names cut off, and the prefix."""
    cut = ""
    while (prefix := next((p for p in PREFIXES if state and all(n.startswith(p) for n in state)), None)) is not None:
        state, cut = {name.removeprefix(prefix): value for name, value in state.items()}, cut + prefix
    return state, cut


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
