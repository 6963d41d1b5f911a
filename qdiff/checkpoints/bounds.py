"""What a packed file may describe: no network larger than its tensors, and no tensors that make no grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from qdiff.recipes.plain_data import brief
from qdiff.recipes.recipe import Recipe

FLOATS = ("F16", "BF16", "F32", "F64")
WHOLE = ("I16", "I32")
ROOM = 4  # what is little larger than the file is built, on the meta device, to name the first tensor that differs
CODES_PER_BYTE = 4  # at most: codes have two bits or more
MODULES_PER_TENSOR, MODULES = 4, 200  # generous: a network has fewer modules than tensors
MOST_TIMESTEPS, MOST_PLACES = 10**5, 2**25  # of a schedule; of a table of the schedule's and the sampler's timesteps
MOST_RULES = 10**4
SMALL = 10**6  # entries that any file may ask for


def header_of(file: Any) -> dict[str, tuple[str, list[int]]]:
    """(dtype, shape) of an open safetensors file's tensors by name; none of them is read."""
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    return {key: (found.get_dtype(), found.get_shape()) for key, found in slices.items()}


def check_types(header: Mapping[str, tuple[str, list[int]]]) -> None:
    """Raise ValueError naming a tensor that is stored as another kind of number than its name says."""
    for key, (dtype, _) in header.items():
        wanted = ("U8",) if key.endswith(".codes") else WHOLE if _is_zero_point(key) else FLOATS
        if dtype not in wanted:
            raise ValueError(f"expected {key} as {' or '.join(wanted)}, found {dtype}")


def check_values(key: str, tensor: Tensor) -> None:
    """Raise ValueError naming a tensor with values that are not finite, or a scale that is not positive."""
    if not tensor.is_floating_point():
        return
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{key}: expected finite values, found {tensor[~tensor.isfinite()][0].item()}")
    if (key.endswith(".scale") or key == "activation_scales") and tensor.numel() and not bool((tensor > 0).all()):
        raise ValueError(f"{key}: expected scales above 0, found {tensor.min().item():g}")


def _is_zero_point(key: str) -> bool:
    return key.endswith((".zero_point", "_zero_points"))


def _entries(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _values(header: Mapping[str, tuple[str, list[int]]]) -> int:
    """The most numbers that a file's tensors can stand for."""
    return sum(_entries(shape) * (CODES_PER_BYTE if dtype == "U8" else 1) for dtype, shape in header.values())


def check_numbers(config: Any, header: Mapping[str, tuple[str, list[int]]]) -> None:
    """Raise ValueError for a number in a network's configuration that no width or count in such a file can be."""
    most, todo = max(_values(header), SMALL), [config]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
        elif isinstance(item, (int, float)) and not abs(item) <= most:
            raise ValueError(f"config: expected numbers up to {most}, found {brief(item)}")


@contextmanager
def no_larger_than(header: Mapping[str, tuple[str, list[int]]]) -> Iterator[None]:
    """Within the block, modules that are made have together no more parameters, in number and size, than fit a file's
    tensors: the one too many raises ValueError before anything is done with it."""
    held = _values(header)
    left = {"parameters": ROOM * held + SMALL, "modules": MODULES + MODULES_PER_TENSOR * len(header)}

    def take(kind: str, count: int) -> None:
        left[kind] -= count
        if left[kind] < 0:
            raise ValueError(f"it describes more {kind} than its {len(header)} tensors ({held} values) can be")

    hooks = [
        register_module_parameter_registration_hook(
            lambda _, name, p: take("parameters", 0 if p is None else p.numel())
        ),
        register_module_module_registration_hook(lambda _, name, module: take("modules", 1)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_tables(
    network: nn.Module, recipe: Recipe, num_timesteps: Any, steps: int, header: Mapping[str, tuple[str, list[int]]]
) -> None:
    """Raise ValueError where the tables that a description asks for are larger than a file of that header needs.

    steps: timesteps of the calibration's sampler.
    """
    if type(num_timesteps) is not int or not 1 <= num_timesteps <= MOST_TIMESTEPS:
        raise ValueError(f"num_diffusion_timesteps: expected 1 to {MOST_TIMESTEPS}, found {brief(num_timesteps)}")
    if num_timesteps * steps > MOST_PLACES:
        raise ValueError(f"timesteps: expected at most {MOST_PLACES // num_timesteps}, found {steps}")
    if len(recipe.rules) > MOST_RULES:
        raise ValueError(f"rules: expected at most {MOST_RULES}, found {len(recipe.rules)}")
    if recipe.activations is None:
        return
    by_channel = recipe.activations.axis == "in_channel"
    widest = max(p.shape[1] for p in network.parameters() if p.dim() > 1) if by_channel else 1
    held = sum(_entries(shape) for key, (_, shape) in header.items() if key.endswith(("activation_scales", ".scale")))
    sets = recipe.step_groups.sets(steps)
    if sets * widest > SMALL + 4 * held:
        raise ValueError(f"step_groups: {sets} sets of {widest} scales are more than the {held} that it holds")
