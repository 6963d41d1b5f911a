"""Pickles that ask for more than they hold: refused in one line before anything is made of them."""

import io
import pickle
import random
import resource
import time
import zipfile

import pytest
import torch

from qdiff.utils.files import load_pickle, parse_json, parse_yaml, save_pickle


def refused(path):
    """The one line that reading gives."""
    started = time.process_time()
    with pytest.raises(ValueError) as error:
        load_pickle(path, "checkpoint")
    message = str(error.value)
    assert message.startswith(f"{path}: not a readable checkpoint: ") and "\n" not in message
    assert time.process_time() - started < 5
    return message


def rewritten(path, data, compression=zipfile.ZIP_STORED):
    """Put a pickle in place of the one of an archive of `torch.save`; None keeps it."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, data if data is not None and name.endswith("data.pkl") else content)


def sparse():
    return torch.sparse_coo_tensor([[0], [0]], [1.0], (2**20, 2**20))


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


KINDS = {
    "sparse": (sparse, "_rebuild_sparse_tensor"),
    "nested": (nested, "_rebuild_nested_tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "_rebuild_qtensor"),
    "meta": (lambda: torch.empty(2**40, device="meta"), "_rebuild_meta_tensor_no_storage"),
    "expanded": (lambda: torch.zeros(1).expand(2**20, 400), "takes 1677721600 bytes, the file has 4 for it"),
    "repeated": (lambda: torch.zeros(1, 3).expand(9, 3), "takes 108 bytes, the file has 12 for it"),
    "overlapping": (lambda: torch.zeros(9).as_strided((5, 5), (1, 1)), "takes 100 bytes, the file has 36 for it"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("make", "message"), KINDS.values(), ids=KINDS)
def test_tensors_that_are_not_plain_and_dense_are_refused(tmp_path, make, message, legacy):
    path = tmp_path / "a.pt"
    torch.save({"a": [make()]}, path, _use_new_zipfile_serialization=not legacy)
    assert message in refused(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_plain_tensors_and_containers_come_back(tmp_path, legacy):
    path, weight = tmp_path / "a.pt", torch.arange(12.0).view(3, 4)
    content = {"a": [weight, weight.T], "b": {1: (torch.nn.Parameter(weight), None)}, "c": weight[1:, 2:], "d": b"x"}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    back = load_pickle(path, "checkpoint")
    assert torch.equal(back["a"][1], weight.T) and torch.equal(back["b"][1][0], weight)
    assert torch.equal(back["c"], weight[1:, 2:]) and back["d"] == b"x"


def test_one_entry_may_stand_for_all_steps_where_the_reader_says_so(tmp_path):
    path, repeated = tmp_path / "a.pt", torch.arange(3.0).expand(9, 3)
    save_pickle({"cs": repeated}, path)
    assert torch.equal(load_pickle(path, "calibration data", repeats=True)["cs"], repeated)
    assert "takes 108 bytes" in refused(path)
    save_pickle({"cs": torch.zeros(1).expand(2, 2**28)}, path)  # not along other axes
    with pytest.raises(ValueError, match="the file has 4 for it"):
        load_pickle(path, "calibration data", repeats=True)


def test_archives_that_unpack_to_more_than_they_are_are_not_unpacked(tmp_path):
    path = tmp_path / "a.pt"
    save_pickle({"a": torch.zeros(2**18)}, path)
    rewritten(path, None, zipfile.ZIP_DEFLATED)
    assert "its entries ask for 10" in refused(path)


@pytest.mark.parametrize("name", ["builtins bytearray", "torch._tensor _rebuild_from_type_v2", "torch.\x1b[2J Evil"])
def test_names_beyond_those_of_plain_tensors_are_refused_before_they_are_called(tmp_path, name):
    """PyTorch's own reader calls the first: 10 GB."""
    path = tmp_path / "a.pt"
    save_pickle({}, path)
    module, function = name.split(" ")
    rewritten(path, b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"\x8a\x05\x00\xe4\x0b\x54\x02\x85R.")
    assert f"it holds an object of {module}.{function}, and only tensors" in refused(path)


def test_tuples_that_take_forever_to_compare_are_refused(tmp_path):
    """As a key of a dictionary such a tuple is hashed part by part: 2^60 of them in 300 bytes."""
    path = tmp_path / "a.pt"
    save_pickle({}, path)
    doubled = b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(60))
    rewritten(path, b"\x80\x02})" + doubled + b"K\x01s.")
    assert "its parts hold one another too often" in refused(path)


def test_no_change_of_a_pickle_gives_another_kind_of_error_or_takes_the_machine(tmp_path):
    path, chance = tmp_path / "a.pt", random.Random(0)
    content = {"xs": [torch.zeros(2, 3), torch.ones(2, 3)], "ts": torch.zeros(2), "names": ("a", {"b": 2.5, 3: None})}
    for legacy in (False, True):
        whole = io.BytesIO()
        torch.save(content, whole, _use_new_zipfile_serialization=not legacy)
        path.write_bytes(whole.getvalue())
        with zipfile.ZipFile(path) if not legacy else io.BytesIO() as archive:
            name = None if legacy else next(n for n in archive.namelist() if n.endswith("data.pkl"))
            sound = whole.getvalue() if legacy else archive.read(name)
        started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(200):
            data = bytearray(sound)
            for _ in range(chance.randint(1, 3)):
                data[chance.randrange(len(data))] = chance.choice((chance.randrange(256), *b"K\xff(t\x85\x86RQh."))
            path.write_bytes(data if legacy else whole.getvalue())
            if not legacy:
                rewritten(path, bytes(data))
            try:
                load_pickle(path, "checkpoint")
            except ValueError as error:
                assert str(error).startswith(f"{path}: not a readable checkpoint: ") and "\n" not in str(error)
        assert time.process_time() - started < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18


# JSON and YAML


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_text_nested_a_thousand_deep_is_a_plain_error(parse):
    with pytest.raises(ValueError, match="nested too deep"):
        parse("[" * 5000 + "]" * 5000)


def test_yaml_that_multiplies_itself_is_refused():
    lines = ["a0: &a0 {k: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60))]
    with pytest.raises(ValueError, match="merge keys"):
        parse_yaml("\n".join(lines))


def test_yaml_makes_plain_data_only():
    assert parse_yaml("a: [1, 2.5, text]") == {"a": [1, 2.5, "text"]}
    with pytest.raises(ValueError, match="could not determine a constructor"):
        parse_yaml("a: !!python/object/apply:os.getcwd []")


def test_a_plain_pickle_is_not_a_file_of_tensors(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}, protocol=2) * 5)
    assert "truncated or not a PyTorch file" in refused(tmp_path / "a.pt")
