import pytest
from torch import nn

from qdiff.evaluation.cost import float_bytes, stored_bytes


def test_a_file_takes_its_length(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1234))
    assert stored_bytes(path) == stored_bytes(str(path)) == 1234


def test_a_folder_takes_its_files(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "recipe.yaml").write_bytes(bytes(30))
    assert stored_bytes(tmp_path) == 1030


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        stored_bytes(tmp_path / "absent.pth")


def test_a_float_network_takes_four_bytes_a_parameter():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert float_bytes(network) == 4 * (8 * 3 * 9 + 8 + 8 + 8)
    assert float_bytes(network.half()) == 4 * (8 * 3 * 9 + 8 + 8 + 8)


def test_a_shared_parameter_counts_once():
    first, second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    second.weight = first.weight
    assert float_bytes(nn.Sequential(first, second)) == 4 * 25
