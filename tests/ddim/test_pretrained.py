import argparse
import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddim.noise import ImageNoise
from ddim.pretrained import (
    PUBLISHED,
    REPOSITORY,
    build_network,
    find_pretrained,
    load_config,
    load_pretrained,
    load_state,
    load_weights,
    sha256,
)
from ddim.schedules import beta_schedule, cumulative_alphas

SMALL = REPOSITORY / "configs" / "cifar10-small.yml"


@pytest.fixture
def config():
    return load_config(SMALL)


def fails(kind, call, *mentions):
    """The call raises `kind` with one line that mentions everything asked."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [m for m in map(str, mentions) if m not in message] == [], message


# the bundled model


def test_bundled_model_predicts_the_noise(config):
    network, path = load_pretrained(config)
    assert path == REPOSITORY / "models" / "cifar10-ddim" / "model.safetensors"
    assert not network.training and all(p.dtype == torch.float32 for p in network.parameters())
    alphas = cumulative_alphas(beta_schedule("linear", 1e-4, 0.02, 1000))
    noise = ImageNoise(0, range(2), (3, 32, 32), "cpu")()
    with torch.no_grad():
        for t in (200, 500, 900):
            predicted = network((1 - alphas[t]).sqrt().float() * noise, torch.tensor([t, t]))  # a grey image, noised
            assert ((predicted - noise).norm() / noise.norm()) < 0.1


def test_pretrained_weights_take_the_asked_dtype(config):
    network, _ = load_pretrained(config, torch.float64)
    single, _ = load_pretrained(config)
    assert all(torch.equal(a, b.double()) for a, b in zip(network.parameters(), single.parameters(), strict=True))


def test_network_weights_follow_the_seed_and_leave_the_global_generator_alone(config):
    state = torch.random.get_rng_state()
    first, again, other = (build_network(config, seed).conv_in.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


# configurations


@pytest.mark.parametrize("name", ["cifar10.yml", "cifar10-small.yml"])
def test_bundled_configurations_load(name):
    config = load_config(REPOSITORY / "configs" / name)
    assert config.config_file.endswith(name)
    assert config.data.channels == config.model.in_channels == 3


def test_configuration_errors_name_the_file(tmp_path):
    path = tmp_path / "a.yml"
    fails(FileNotFoundError, lambda: load_config(path), path)
    path.write_text("data: {image_size: 32\n")
    fails(ValueError, lambda: load_config(path), path, "YAML")
    path.write_text("- 1\n")
    fails(ValueError, lambda: load_config(path), path, "sections")
    text = SMALL.read_text()
    path.write_text(text.replace("diffusion:", "diffuse:"))
    fails(ValueError, lambda: load_config(path), path, "missing section diffusion", "diffuse")
    path.write_text(text.replace("  ch_mult", "  multipliers"))
    fails(ValueError, lambda: load_config(path), path, "missing model.ch_mult")
    path.write_text(text.replace("rescaled: true", "rescaled: false"))
    fails(ValueError, lambda: load_config(path), path, "[-1, 1]")


# finding checkpoints


def test_a_path_is_found_beside_the_configuration_and_in_the_current_folder(tmp_path, monkeypatch, config):
    beside, current = tmp_path / "beside", tmp_path / "current"
    for folder in (beside, current):
        folder.mkdir()
    monkeypatch.chdir(current)
    config.pretrained, config.config_file = "a.safetensors", str(beside / "a.yml")
    fails(FileNotFoundError, lambda: find_pretrained(config), beside, current, REPOSITORY, "a.safetensors")
    (beside / "a.safetensors").touch()
    assert find_pretrained(config) == beside / "a.safetensors"
    (current / "a.safetensors").touch()
    assert find_pretrained(config) == current / "a.safetensors"


def test_no_pretrained_model_named(config):
    del config.pretrained
    fails(ValueError, lambda: find_pretrained(config), "cifar10-small.yml", "ema_cifar10")


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_published_models_are_looked_up_in_the_cache_and_verified(tmp_path, monkeypatch, config, variable):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    cache = tmp_path if variable == "XDG_CACHE_HOME" else tmp_path / ".cache"
    config.pretrained = "ema_cifar10"
    path = cache / "diffusion_models_converted" / "ema_diffusion_cifar10_model" / "model-790000.ckpt"
    md5 = "1fa350b952534ae442b1d5235cce5cd3"
    fails(FileNotFoundError, lambda: find_pretrained(config), path, md5, "pesser/pytorch_diffusion")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"other weights")
    found = hashlib.md5(b"other weights").hexdigest()
    fails(ValueError, lambda: find_pretrained(config), path, md5, found)
    monkeypatch.setitem(PUBLISHED, "ema_cifar10", (PUBLISHED["ema_cifar10"][0], found))
    assert find_pretrained(config) == path


# reading checkpoints


@pytest.fixture
def state(generator):
    return {"a.weight": torch.randn(64, 64, generator=generator), "a.bias": torch.randn(64, generator=generator)}


def save(state, path, legacy=False):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("name, legacy", [("a.safetensors", False), ("a.pth", False), ("a.ckpt", True)])
def test_every_format_gives_the_same_tensors_in_float32(tmp_path, state, name, legacy):
    save({"a.weight": state["a.weight"].half(), "a.bias": state["a.bias"]}, tmp_path / name, legacy)
    loaded = load_state(tmp_path / name)
    assert all(value.dtype == torch.float32 for value in loaded.values())
    assert torch.equal(loaded["a.weight"], state["a.weight"].half().float())
    assert torch.equal(loaded["a.bias"], state["a.bias"])


@pytest.mark.parametrize("name, legacy", [("a.safetensors", False), ("a.pth", False), ("a.ckpt", True)])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path, state, name, legacy, part):
    path = tmp_path / name
    save(state, path, legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    fails(ValueError, lambda: load_state(path), path, "is not a readable checkpoint: ")


def test_missing_files_are_named(tmp_path):
    fails(FileNotFoundError, lambda: load_state(tmp_path / "a.pth"), tmp_path / "a.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_of_other_classes_are_refused_by_name(tmp_path, legacy):
    path = tmp_path / "a.pth"
    save({"args": argparse.Namespace(lr=1)}, path, legacy)
    fails(ValueError, lambda: load_state(path), path, "class argparse.Namespace")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    path, witness = tmp_path / "a.pth", tmp_path / "witness"
    path.write_bytes(pickle.dumps(Attack(witness), protocol=2))
    fails(ValueError, lambda: load_state(path), path)
    save({"a": Attack(witness)}, path)
    fails(ValueError, lambda: load_state(path), path, "is not a readable checkpoint: it holds an object of class ")
    assert not witness.exists()


@pytest.mark.parametrize("content, found", [([torch.zeros(1)], "a list"), ({"a": 1}, "other objects")])
def test_other_contents_are_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "a.pth")
    fails(ValueError, lambda: load_state(tmp_path / "a.pth"), tmp_path / "a.pth", "expected a state dict", found)


def test_weights_of_another_architecture_are_refused_whole(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    state["conv_in.weight"] = torch.zeros(64, 3, 3, 3)
    state |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    del state["temb.dense.0.bias"]
    mentions = (
        "some.pth does not fit",
        "1 missing: temb.dense.0.bias;",
        "5 unexpected: extra.0, extra.1, extra.2, …;",
        "conv_in.weight (expected [32, 3, 3, 3], found [64, 3, 3, 3])",
    )
    fails(ValueError, lambda: load_weights(network, state, "some.pth"), *mentions)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_checkpoint_of_the_bundled_model_does_not_fit_the_published_network(config):
    config.model.ch = 128
    fails(ValueError, lambda: load_pretrained(config), "model.safetensors does not fit", "of another shape: conv_in")


def test_weights_are_copied_into_the_parameters_that_exist(network, case_state):
    weight = network.conv_in.weight
    load_weights(network, {name: value + 1 for name, value in case_state.items()}, "some.pth")
    assert network.conv_in.weight is weight
    assert torch.equal(weight, case_state["conv_in.weight"] + 1)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_configuration_nested_without_end_is_refused(tmp_path):
    (tmp_path / "deep.yml").write_text("[" * 20_000)
    fails(ValueError, lambda: load_config(tmp_path / "deep.yml"), "deep.yml", "not valid YAML")
