"""State dicts in the layouts that people have, and tensors that are none to load."""

import resource
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from ddim.checkpoints import open_checkpoint
from ddim.layouts import QUANTIZED
from ddim.pretrained import REPOSITORY as ROOT
from ddim.pretrained import build_network, load_config, load_pretrained, load_state, load_weights

W, EMA = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2)}, {"conv.weight": torch.full((2, 3), 5.0)}
OPTIMIZER = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


LAYOUTS = {
    "a state dict": (W, W, None),
    "Lightning": ({"state_dict": W, "epoch": 3, "optimizer_states": [OPTIMIZER]}, W, None),
    "DDIM training": ([prefixed("module.", W), OPTIMIZER, 3, 1000, EMA], EMA, "its averages (EMA) taken"),
    "DDIM without averages": ([W, OPTIMIZER, 3, 1000], W, "its first entry taken"),
    "model and ema": ({"model": W, "ema": EMA, "step": 7}, EMA, "its averages 'ema' (EMA) taken"),
    "model alone": ({"model": W, "opt": OPTIMIZER}, W, "its model taken"),
    "averages beside": ({"state_dict": W, "ema_state_dict": EMA}, EMA, "its averages 'ema_state_dict' (EMA) taken"),
    "DataParallel": (prefixed("module.", W), W, "all taken, 2 tensors, 'module.' cut off"),
    "averages within": ({"model": W, "ema": {"decay": torch.ones(1), "shadow": EMA}}, EMA, "'ema.shadow' (EMA) taken"),
    "averages beside what they are made of": (
        {"model": W, "ema": {"step": torch.ones(1), **prefixed("online_model.", W), **prefixed("ema_model.", EMA)}},
        *(EMA, "its averages 'ema' (EMA) taken, 1 tensors, 'ema_model.' cut off"),
    ),
    "averages without names": (
        {"model": W, "ema": {"decay": 0.9, "shadow_params": [*EMA.values()]}},
        *(W, "its model taken, 2 tensors; 'ema' has no names and is not read"),
    ),
    "wrapped twice": ({"model": {"state_dict": W, "epoch": 2}}, W, "its model.state_dict taken"),
    "compiled": (prefixed("module._orig_mod.", W), W, "'module._orig_mod.' cut off"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_people_have(tmp_path, caplog, layout):
    content, expected, said = LAYOUTS[layout]
    path = tmp_path / "a.pth"
    torch.save(content, path)
    with open_checkpoint(path) as found:
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(caplog.messages) == (said is not None)
    assert said is None or (said in caplog.messages[0] and str(path) in caplog.messages[0])


def test_prefixes_are_cut_off_in_safetensors_too(tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    save_file(prefixed("module.", W), path)
    with open_checkpoint(path) as found:
        assert found.keys() == W.keys() and found.shape("conv.weight") == (2, 3) and "module.conv.bias" not in found
        assert all(torch.equal(found[name], W[name]) for name in W)
    assert caplog.messages == [f"{path}: all taken, 2 tensors, 'module.' cut off"]


STRANGE = {
    "on the device meta": torch.zeros(2, device="meta"),
    "a sparse one": torch.eye(2).to_sparse(),
    "a quantized one": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "repeats the 4 bytes it has in the file": torch.zeros(1).expand(1000, 1000, 1000),
}


@pytest.mark.parametrize("found", STRANGE)
@pytest.mark.parametrize("wrap", [dict, lambda state: {"ema": state}, lambda state: [W, {}, 0, 0, state]])
def test_only_plain_tensors_are_read(tmp_path, found, wrap):
    torch.save(wrap({"a": torch.ones(1), "conv.weight": STRANGE[found]}), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth is not a readable checkpoint: conv.weight: expected a plain") as error:
        open_checkpoint(tmp_path / "a.pth")
    assert found in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *("scaled_fp8", "a.weight_scale", "a.scale_weight", "a.weight.absmax", "a.SCB", "a.weight._data", "a.qweight"),
        *("a.comfy_quant", "a.weight_packed", "a.scales", "a._weight_qdata", "weight:scale", "a.input_quantizer._amax"),
    ],
)
def test_scales_beside_a_weight_are_refused(tmp_path, name):
    torch.save({**W, name: torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: {name} belongs to a quantized weight, expected float weights"):
        open_checkpoint(tmp_path / "a.pth")


def test_names_of_float_models_are_not_taken_for_scales():
    names = ["loss.scaling_layer.scale", "logit_scale", "scale_factor", "a.parametrizations.weight.original0", "weight"]
    assert not [name for name in (*names, "a.weight_g", "a.weight_orig") if QUANTIZED.fullmatch(name)]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.double().fill_(1e300), "expected finite numbers, found 3456 of 3456 beyond float32"),
        (lambda w: w.mul(float("nan")), r"expected finite numbers, found 3456 of 3456 NaN or infinite"),
        (lambda w: w.mul(100).to(torch.int8), "expected floating-point numbers, found int8"),
        (lambda w: w.to(torch.complex64), "expected floating-point numbers, found complex64"),
    ],
)
def test_weights_are_finite_floats(tmp_path, change, complaint):
    network = build_network(load_config(ROOT / "configs" / "cifar10.yml"))
    state = network.state_dict() | {"conv_in.weight": change(network.conv_in.weight.detach())}
    torch.save(state, tmp_path / "a.pth")
    before = network.conv_in.weight.clone()
    with pytest.raises(ValueError, match=f"a.pth: conv_in.weight: {complaint}"):
        load_weights(network, load_state(tmp_path / "a.pth"), tmp_path / "a.pth")
    assert torch.equal(network.conv_in.weight, before)


def test_float8_without_scales_is_read_as_it_is(tmp_path):
    torch.save({"a": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn)}, tmp_path / "a.pth")
    assert torch.equal(load_state(tmp_path / "a.pth")["a"], torch.tensor([0.5, -2.0]))


@pytest.mark.parametrize("kind", ["float8_e8m0fnu", "float4_e2m1fn_x2"])
def test_types_of_scales_and_packed_numbers_are_refused(kind):
    if not hasattr(torch, kind):
        pytest.skip("a type of newer PyTorch")
    weight = {"weight": torch.zeros(2, 4, dtype=torch.uint8).view(getattr(torch, kind))}
    with pytest.raises(ValueError, match=f"a.pth: weight: expected floating-point numbers, found {kind}"):
        load_weights(torch.nn.Linear(4, 2, bias=False), weight, "a.pth")


def applied(name, size):
    """A pickle that calls what it names with a number."""
    module, function = name.rsplit(".", 1)
    return b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"\x8a\x05" + size.to_bytes(5, "little") + b"\x85R"


PICKLES = {
    "bytes": (applied("builtins.bytearray", 10**10) + b".", "an object of class builtins.bytearray, expected tensors"),
    "memory of no file": (
        b"\x80\x02}X\x01\x00\x00\x00a" + applied("torch.Tensor", 10**9)[2:] + b"s.",
        "its tensors take 4000000000 bytes, the file has",
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_ask_for_memory_are_refused(tmp_path, case):
    path, (pickled, complaint) = tmp_path / "a.ckpt", PICKLES[case]
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"a.ckpt is not a readable checkpoint: .*{complaint}"):
        open_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18


def test_archives_that_unpack_to_more_than_they_are_are_not_unpacked(tmp_path):
    torch.save({"a": torch.zeros(2**18)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="its entries ask for 10"):
        open_checkpoint(tmp_path / "a.ckpt")


def test_a_network_larger_than_its_file_takes_no_memory(tmp_path):
    """Its weights would be 180 GB: names and shapes are compared first."""
    config = load_config(ROOT / "configs" / "cifar10.yml")
    config.model.update({"ch": 2**15, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []})
    torch.save(W, tmp_path / "a.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="a.pth does not fit the network"):
        load_pretrained(config, path=tmp_path / "a.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18


@pytest.mark.parametrize(
    ("key", "value"), [("ch_mult", [1000000]), ("ch_mult", [1] * 99), ("num_res_blocks", 10**9), ("ch", 2**40)]
)
def test_sizes_that_fill_a_machine_are_refused_before_anything_is_built(key, value):
    config = load_config(ROOT / "configs" / "cifar10.yml")
    config.model[key] = value
    with torch.device("meta"), pytest.raises(ValueError, match="expected whole numbers up to"):
        build_network(config)
