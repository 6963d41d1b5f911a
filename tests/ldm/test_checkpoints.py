import argparse
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoints import load_into, open_checkpoint

REPOSITORY = Path(__file__).parents[2]


def fails(kind, call, *mentions):
    """The call raises `kind` with one line that mentions everything asked."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [m for m in map(str, mentions) if m not in message] == [], message


def lightning(state, **others):
    """What a CompVis training run saves: weights among callbacks, optimizer states and numpy scalars."""
    callback = object.__new__(EarlyStopping)  # an instance, with attributes of its own
    callback.__dict__.update(patience=3, best=torch.zeros(2))
    return {
        "epoch": 3,
        "global_step": np.int64(470000),
        "pytorch-lightning_version": "1.4.2",
        "state_dict": OrderedDict(state),
        "callbacks": {
            ModelCheckpoint: {"monitor": "val/loss", "best_model_score": np.float64(0.25), "dirpath": "/a/b"},
            "early": callback,
        },
        "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [{"lr_lambdas": [None], "last_epoch": np.float32(2.5), "big": np.array(3.0, ">f8")[()]}],
        **others,
    }


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(3, 4, generator=generator) for name in ("a.weight", "b.c.weight")}
    return {**state, "half": torch.randn(5, generator=generator).half(), "count": torch.tensor(7)}


def same(first, second):
    return list(first) == list(second) and all(
        torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first
    )


# reading


def save_zip(state, folder):
    torch.save(state, folder / "a.pth")
    return folder / "a.pth"


def save_legacy(state, folder):
    torch.save(state, folder / "a.ckpt", _use_new_zipfile_serialization=False)
    return folder / "a.ckpt"


def save_parameters(state, folder):
    parameters = {name: nn.Parameter(value, requires_grad=value.is_floating_point()) for name, value in state.items()}
    return save_zip(parameters, folder)


def save_lightning(state, folder):
    torch.save(lightning(state), folder / "model.ckpt")
    return folder / "model.ckpt"


def save_lightning_legacy(state, folder):
    return save_legacy(lightning(state), folder)


def save_safetensors(state, folder):
    save_file(dict(sorted(state.items())), folder / "a.safetensors")
    return folder / "a.safetensors"


WRITERS = [save_zip, save_legacy, save_parameters, save_lightning, save_lightning_legacy, save_safetensors]


@pytest.mark.parametrize("save", WRITERS)
def test_every_format_gives_the_same_tensors(tmp_path, state, save):
    path = save(state, tmp_path)
    with open_checkpoint(path) as checkpoint:
        assert same({name: checkpoint[name] for name in state}, state)
        assert sorted(checkpoint) == sorted(state) and len(checkpoint) == len(state)
        assert "a.weight" in checkpoint and "a" not in checkpoint and "optimizer_states" not in checkpoint
        assert checkpoint.shape("half") == (5,) and checkpoint.dtype("half") == torch.float16
        assert not any(value.requires_grad for value in checkpoint.values())
        for ask in (checkpoint.__getitem__, checkpoint.shape):
            with pytest.raises(KeyError):
                ask("a")
        kept = checkpoint["a.weight"]
    assert torch.equal(kept, state["a.weight"])


def test_safe_globals_are_as_before(tmp_path, state):
    before = set(torch.serialization.get_safe_globals())  # a list in the order of a set
    open_checkpoint(save_lightning(state, tmp_path))
    assert set(torch.serialization.get_safe_globals()) == before


class Attack:
    """Creates a file when it is unpickled freely."""

    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["state_dict", "callbacks", "hyper_parameters"])
@pytest.mark.parametrize(
    "make, name",
    [
        (lambda witness: Attack(os.system, f"touch {witness}"), f"{os.name}.system"),
        (lambda witness: Attack(Path.touch, Path(witness)), "getattr,"),
        (lambda witness: Attack(eval, f"open({str(witness)!r}, 'w')"), "eval,"),
        (lambda witness: argparse.Namespace(a=1), "argparse.Namespace"),
        (lambda witness: np.zeros(3), "multiarray._reconstruct"),
        (lambda witness: subprocess.Popen, ".Popen"),
    ],
)
def test_foreign_objects_are_refused_by_name_and_never_made(tmp_path, state, make, name, where, zipped):
    path, witness = tmp_path / "model.ckpt", tmp_path / "witness"
    content = lightning(state, hyper_parameters={})
    content[where]["foreign"] = make(witness)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    fails(ValueError, lambda: open_checkpoint(path), path, "not a readable checkpoint", name, "expected tensors only")
    assert not witness.exists()


def test_the_attacks_would_work(tmp_path):
    for number, make in enumerate((lambda w: Attack(os.system, f"touch {w}"), lambda w: Attack(Path.touch, Path(w)))):
        witness = tmp_path / str(number)
        pickle.loads(pickle.dumps(make(witness), protocol=2))
        assert witness.exists()


SCALAR = np.float64(1).__reduce__()[0]  # numpy's function that makes scalars: called with other things than numbers


@pytest.mark.parametrize(
    "scalar",
    [
        Attack(SCALAR, np.dtype("O"), b"12345678"),
        Attack(SCALAR, np.dtype("f8"), b"1234567812345678"),
        Attack(SCALAR, np.dtype("f8"), "12345678"),
        Attack(SCALAR, "f8", b"12345678"),
        np.str_("text"),
        np.datetime64(1, "s"),
    ],
)
def test_numpy_scalars_are_numbers_only(tmp_path, state, scalar):
    path = tmp_path / "model.ckpt"
    torch.save(lightning(state, other=scalar), path)
    fails(ValueError, lambda: open_checkpoint(path), path, "not a readable checkpoint")


@pytest.mark.parametrize("save", WRITERS)
@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, state, save, part):
    path = save(state, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    fails(ValueError, lambda: open_checkpoint(path), path, "not a readable checkpoint")


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"<html>not found</html>", b"PK\x03\x04", bytes(range(256)) * 4])
def test_foreign_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    fails(ValueError, lambda: open_checkpoint(tmp_path / name), tmp_path / name, "not a readable checkpoint")
    fails(FileNotFoundError, lambda: open_checkpoint(tmp_path / "b.ckpt"), tmp_path / "b.ckpt")
    fails(FileNotFoundError, lambda: open_checkpoint(tmp_path), tmp_path)


@pytest.mark.parametrize(
    "content, found",
    [
        ([torch.zeros(1)], "a list"),
        ({"a": 1}, "other objects"),
        ({"state_dict": {"a": "text"}}, "other objects"),
        ([{"step": 1}, {"a": torch.zeros(1)}], "a list"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "a.pth")
    fails(ValueError, lambda: open_checkpoint(tmp_path / "a.pth"), tmp_path / "a.pth", "expected a state dict", found)


# streaming into a module


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.again = nn.Linear(4, 3)
        self.again.weight = self.first.weight


def weights(seed=0):
    torch.manual_seed(seed)
    return {name: torch.randn(value.shape).to(value.dtype) for name, value in Small().state_dict().items()} | {
        "again.weight": torch.ones(3, 4),
        "first.weight": torch.ones(3, 4),
    }


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("meta", [False, True])
def test_loads_with_the_modules_dtype(tmp_path, half, dtype, meta):
    source = {n: v.half() if half and v.is_floating_point() else v for n, v in weights().items()}
    path = save_zip({f"part.{name}": value for name, value in source.items()}, tmp_path)
    with torch.device("meta" if meta else "cpu"):
        module = Small().to(dtype)
    module.first.requires_grad_(False)
    with open_checkpoint(path) as checkpoint:
        assert load_into(module, checkpoint, prefix="part.") == set(checkpoint)
    for name, value in module.state_dict().items():
        assert torch.equal(value, source[name].to(value.dtype)), name
        assert value.dtype == (dtype if value.is_floating_point() else torch.int64)
    assert module.again.weight is module.first.weight
    assert not module.first.weight.requires_grad and module.norm.weight.requires_grad


def test_parameters_keep_their_identity():
    module = Small()
    before = dict(module.named_parameters())
    load_into(module, weights())
    assert all(value is before[name] for name, value in module.named_parameters())


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("prefix", ["", "part."])
def test_nothing_is_loaded_if_anything_does_not_fit(prefix, meta):
    source = {prefix + name: value for name, value in weights().items()}
    for name in ("norm.weight", "norm.bias", "norm.running_mean", "again.bias"):
        del source[prefix + name]
    source[f"{prefix}first.weight"] = torch.zeros(5, 4)
    with torch.device("meta" if meta else "cpu"):
        module = Small()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fails(
        ValueError,
        lambda: load_into(module, source, prefix=prefix),
        f"4 missing: {prefix}norm.weight, {prefix}norm.bias, {prefix}norm.running_mean, …;",
        f"1 of another shape: {prefix}first.weight (expected [3, 4], found [5, 4])",
    )
    after = module.state_dict()
    assert all(value.is_meta == meta and (meta or torch.equal(value, before[n])) for n, value in after.items())


def test_optional_and_renamed_tensors():
    module, source = Small(), weights()
    kept = module.norm.bias.detach().clone()
    del source["norm.bias"]
    source["other"] = torch.full((3,), 5.0)
    used = load_into(
        module,
        source,
        optional=lambda name: name == "norm.bias",
        rename=lambda name: ("nowhere", "other", name) if name == "first.bias" else (name,),
    )
    assert torch.equal(module.first.bias, source["other"]) and torch.equal(module.norm.bias, kept)
    assert used == set(source) - {"first.bias"}
    with torch.device("meta"):
        module = Small()
    fails(ValueError, lambda: load_into(module, source, optional=lambda name: True), "1 missing: norm.bias")


def test_a_buffer_that_no_file_holds_must_not_be_left_without_values():
    class WithBuffer(Small):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.arange(3), persistent=False)

    with torch.device("meta"):
        module = WithBuffer()
    fails(ValueError, lambda: load_into(module, weights()), "1 missing: steps")
    module = WithBuffer()
    load_into(module, weights())
    assert module.steps.tolist() == [0, 1, 2]


STREAMING = """
import re, sys, torch
from torch import nn
from ldm.checkpoints import load_into, open_checkpoint

def anonymous():  # memory that is not a view of a file, in bytes
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

class Watched(dict):  # not a Checkpoint: looks at the memory at every access
    def __getitem__(self, name):
        Watched.peak = max(Watched.peak, anonymous())
        return super().__getitem__(name)

with torch.device("meta"):
    first = nn.Linear(2, 2)
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(16)])  # 4 MiB each
load_into(first, {"weight": torch.zeros(2, 2).half(), "bias": torch.zeros(2)})  # whatever is imported the first time
Watched.peak = start = anonymous()
source = Watched(open_checkpoint(sys.argv[1]))
load_into(model, source)
print(max(Watched.peak, anonymous()) - start)
assert all((parameter == index).all() for index, parameter in enumerate(model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("save, dtype", [(save_safetensors, torch.float16), (save_lightning, torch.float32)])
@pytest.mark.long
def test_loading_takes_the_models_memory_plus_one_tensor(tmp_path, save, dtype):
    state = {f"{i}.weight": torch.full((1024, 1024), float(i), dtype=dtype) for i in range(16)}
    state |= {f"model_ema.{i}weight": torch.ones(1024, 1024, dtype=dtype) for i in range(16)}
    path = save(state, tmp_path)
    command = [sys.executable, "-c", STREAMING, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    model, tensor = 16 * 4 * 2**20, 4 * 2**20
    assert 0.9 * model < int(result.stdout) < model + 2 * tensor  # one tensor, and what Python itself takes
