"""The cache of references: what was written comes back, what is damaged does not."""

import logging

import pytest
import torch

from qdiff.evaluation.cache import Cache, key_of

TENSORS = {"mu": torch.arange(4.0, dtype=torch.float32), "sigma": torch.eye(4, dtype=torch.float64)}


@pytest.fixture
def cache(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.write("key", TENSORS)
    return cache


def test_what_was_written_comes_back(cache):
    found = Cache(cache.folder).read("key")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())


def test_a_key_that_is_not_there(cache):
    assert cache.read("other") is None and "other" not in cache and "key" in cache


@pytest.mark.parametrize("where", [-1, 8, None], ids=["a value", "the header", "cut short"])
def test_damage_is_noticed_and_logged(cache, caplog, where):
    path = cache.path("key")
    content = bytearray(path.read_bytes())
    if where is None:
        content = content[: len(content) // 2]
    else:
        content[where] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert Cache(cache.folder).read("key") is None
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "damaged" in record.getMessage() and "\n" not in record.getMessage()


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    Cache(tmp_path / "file" / "cache").write("key", TENSORS)
    assert "nothing is kept" in caplog.text


def test_keys_depend_on_everything():
    one = {"images": "a", "layer": "2048"}
    assert key_of(one) == key_of(dict(reversed(one.items())))
    assert len({key_of(one), key_of(one | {"layer": "spatial"}), key_of(one | {"images": "b"})}) == 3
