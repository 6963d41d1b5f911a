"""Checkpoints streamed into a model: tensor by tensor, all or nothing."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ddim.checkpoints import Checkpoint, first_names, open_checkpoint, require_float

__all__ = ["Checkpoint", "load_into", "open_checkpoint"]


def load_into(
    module: nn.Module,
    source: Mapping[str, Tensor],
    *,
    prefix: str = "",  # of the module's names in the source
    optional: Callable[[str], bool] = lambda name: False,  # may this tensor of the module be missing?
    rename: Callable[[str], Iterable[str]] = lambda name: (name,),  # names to look for, the first one found is taken
    model: str = "the model",  # what messages call the module
) -> set[str]:
    """Copies the tensors of `source` into the module's parameters and buffers, converted to their dtypes.

    Reads one tensor at a time. What the module still has on the meta device gets its memory here, and must be in the
    source. Names are those of `module.state_dict()`. Returns the names in the source that were used.
    Raises ValueError naming the file and the first few names that are missing or of another shape; the module is then
    as it was. Raises ValueError for a parameter's tensor that holds integers, or numbers that are not finite, while it
    copies.
    """
    found = _match(module, source, prefix, optional, rename, model)
    _give_memory(module)
    targets, path = module.state_dict(keep_vars=True), getattr(source, "path", "the checkpoint")
    with torch.no_grad():
        for name, source_name in found.items():
            value = source[source_name]
            if isinstance(targets[name], nn.Parameter):  # a buffer may hold a mask of -inf
                require_float(source_name, value, path, targets[name].dtype)
            targets[name].copy_(value)
    return set(found.values())


def _match(
    module: nn.Module,
    source: Mapping[str, Tensor],
    prefix: str,
    optional: Callable[[str], bool],
    rename: Callable[[str], Iterable[str]],
    model: str,
) -> dict[str, str]:
    """Name in the module -> name in the source, of every tensor to copy. Raises ValueError where they do not fit."""
    expected = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    found, missing, other = {}, [], []
    for name, target in expected.items():
        source_name = next((one for one in rename(prefix + name) if one in source), None)
        if source_name is None:
            if target.is_meta or not optional(prefix + name):
                missing.append(prefix + name)
            continue
        found[name] = source_name
        shape = _shape(source, source_name)
        if shape != target.shape:
            other.append(f"{source_name} (expected {list(target.shape)}, found {list(shape)})")
    known = {id(value) for value in expected.values()}
    tensors = [*module.named_parameters(prefix.rstrip(".")), *module.named_buffers(prefix.rstrip("."))]
    missing += [name for name, value in tensors if value.is_meta and id(value) not in known]  # not in the state dict
    problems = {"missing": missing, "of another shape": other}
    text = "; ".join(f"{len(names)} {kind}: {first_names(names)}" for kind, names in problems.items() if names)
    if text:
        raise ValueError(f"{getattr(source, 'path', 'the checkpoint')} does not fit {model}: {text}")
    return found


def _shape(source: Mapping[str, Tensor], name: str) -> torch.Size:
    return source.shape(name) if isinstance(source, Checkpoint) else source[name].shape


def _give_memory(module: nn.Module) -> None:
    """Replaces tensors on the meta device by uninitialised ones on the CPU; shared parameters stay shared."""
    made = {}
    for owner in module.modules():
        for name, value in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if value.is_meta:
                if value not in made:
                    empty = torch.empty_like(value, device="cpu")
                    made[value] = nn.Parameter(empty, requires_grad=value.requires_grad)
                setattr(owner, name, made[value])
        for name, value in list(owner.named_buffers(recurse=False, remove_duplicate=False)):
            if value.is_meta:
                setattr(owner, name, torch.empty_like(value, device="cpu"))
