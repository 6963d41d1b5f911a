"""Where columns of states go under memory limits, what they take, and rows that are read when they are used."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qdiff.calibration.store
from qdiff.calibration.store import PLACES, Column, MemoryLimits, Rows, Store, map_leaves, read_rows

CPU = torch.device("cpu")
ROW = torch.zeros(1, 3, 5)  # 60 bytes a row in float32


@dataclass(frozen=True)
class State:
    """Like a chain's: leaves, a tuple of leaves, and one that may be missing."""

    h: object
    skips: tuple = ()
    context: object = None


def places(store, *sizes):
    """The columns of so many rows each, kept alive."""
    return [store.column(rows, ROW) for rows in sizes]


# Places and what they take


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (None, ["host", "host", "host"]),
        (0, ["disk", "disk", "disk"]),
        (599, ["disk", "host", "host"]),  # the first does not fit, the small ones behind it do
        (600, ["host", "disk", "disk"]),
        (900, ["host", "host", "host"]),
        (899, ["host", "host", "disk"]),
    ],
)
def test_a_column_goes_to_the_fastest_place_that_has_room_for_it(host, expected, tmp_path):
    store = Store(CPU, MemoryLimits(host=host), tmp_path)
    columns = places(store, 10, 2, 3)
    assert [column.place for column in columns] == expected
    assert host is None or store.peak["host"] <= host


def test_a_cpus_states_count_for_the_host_alone():
    """A limit for the device says nothing there."""
    store = Store(CPU, MemoryLimits(device=0))
    (column,) = places(store, 10)
    assert column.place == "host" and column.data.device == CPU
    assert store.used == {"device": 0, "host": 600, "disk": 0}
    assert not store.has_spilled()


def test_a_devices_states_go_to_the_device_then_to_the_host_then_to_disk(tmp_path):
    """The meta device stands for an accelerator: its tensors take no memory and cannot be read."""
    store = Store(torch.device("meta"), MemoryLimits(device=600, host=300), tmp_path)
    first, *others = places(store, 10)
    assert not store.has_spilled()
    others += places(store, 5, 1)
    assert [column.place for column in (first, *others)] == list(PLACES)
    assert [column.data.device.type for column in (first, *others)] == ["meta", "cpu", "cpu"]
    assert store.used == {"device": 600, "host": 300, "disk": 60}
    assert store.has_spilled()
    del others, first
    assert store.has_spilled()  # once it has, graphs are off for good


def test_a_column_gives_its_bytes_back_when_nobody_holds_it(tmp_path):
    store = Store(CPU, MemoryLimits(host=600), tmp_path)
    first, second = places(store, 10, 4)
    assert store.used == {"device": 0, "host": 600, "disk": 240}
    del first
    assert store.used == {"device": 0, "host": 0, "disk": 240}
    (third,) = places(store, 9)
    assert third.place == "host" and store.used["host"] == 540
    del second, third
    assert store.used == {"device": 0, "host": 0, "disk": 0}
    assert store.peak == {"device": 0, "host": 600, "disk": 240}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("host", [None, 0], ids=["host", "disk"])
def test_what_is_written_is_read_bit_by_bit_wherever_it_lies(dtype, host, tmp_path, generator):
    values = (torch.randn(7, 2, 3, generator=generator) * 50).to(dtype)
    column = Store(CPU, MemoryLimits(host=host), tmp_path).column(7, values)
    assert column.place == ("disk" if host == 0 else "host") and len(column) == 7
    for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):
        column[rows] = values[rows]
    assert torch.equal(column[slice(0, 7)], values) and column[slice(2, 5)].dtype == dtype
    index = torch.tensor([6, 0, 0, 3])
    assert torch.equal(column[index], values[index])


@pytest.mark.parametrize("shape", [(4,), (4, 0), (4, 1, 1, 1)], ids=str)
def test_rows_may_be_numbers_or_empty(shape, tmp_path):
    like = torch.arange(float(torch.Size(shape).numel())).view(shape)
    column = Store(CPU, MemoryLimits(host=0), tmp_path).column(4, like)
    column[slice(0, 4)] = like
    assert torch.equal(column[torch.tensor([3, 1])], like[[3, 1]])


def test_rows_taken_by_index_are_copies(tmp_path):
    column = Store(CPU).column(4, ROW)
    column[slice(0, 4)] = torch.ones(4, 3, 5)
    column[torch.tensor([1])].zero_()
    assert column[slice(0, 4)].min() == 1


# Files


def test_nothing_is_left_behind_on_disk(tmp_path):
    """Not even while columns are in use: a process that is killed leaves nothing either."""
    scratch = tmp_path / "new" / "scratch"
    store = Store(CPU, MemoryLimits(host=0), scratch)
    assert not scratch.exists()  # made when first needed
    columns = places(store, 10, 20)
    assert list(scratch.iterdir()) == []
    columns[0][slice(0, 10)] = torch.full((10, 3, 5), 7.0)
    assert columns[0][slice(4, 5)].eq(7).all()


def test_the_space_on_disk_is_reserved_at_once(tmp_path, monkeypatch):
    """A mapped write that finds the disk full would kill the process."""
    reserved, reserve = [], os.posix_fallocate

    def spy(handle, offset, size):
        reserve(handle, offset, size)
        reserved.append(os.fstat(handle).st_blocks * 512)

    monkeypatch.setattr(os, "posix_fallocate", spy)
    column = Store(CPU, MemoryLimits(host=0), tmp_path).column(2**14, torch.zeros(1, 16))
    assert len(reserved) == 1 and reserved[0] >= column.data.nbytes == 2**20


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_the_space_on_disk_is_free_again_with_the_column(tmp_path):
    def mapped():
        return Path("/proc/self/maps").read_text().count(f"{tmp_path}/")

    store = Store(CPU, MemoryLimits(host=0), tmp_path)
    columns = places(store, 1000, 2000)
    assert mapped() == 2
    columns.pop()
    assert mapped() == 1
    columns.clear()
    assert mapped() == 0


@pytest.mark.parametrize("scratch", [True, False], ids=["given", "default"])
def test_a_full_disk_is_an_os_error_that_names_the_folder(tmp_path, monkeypatch, scratch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(qdiff.calibration.store.tempfile, "tempdir", str(tmp_path))
    store = Store(CPU, MemoryLimits(host=600), tmp_path if scratch else None)
    (kept,) = places(store, 10)
    with pytest.raises(OSError, match="No space left on device") as error:
        places(store, 1)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path)
    assert store.used == {"device": 0, "host": 600, "disk": 0} and list(tmp_path.iterdir()) == []
    assert kept.place == "host"


def test_a_file_that_the_system_refuses_is_an_os_error_too(tmp_path, smaller_files):
    """Where no disk can be filled: files of 64 KiB may be written and no larger ones."""
    store = Store(CPU, MemoryLimits(host=0), tmp_path)
    with smaller_files(2**16):
        column = store.column(2**14, torch.zeros(1))
        column[slice(0, 2**14)] = torch.ones(2**14)
        with pytest.raises(OSError, match="File too large") as error:
            store.column(2**14 + 1, torch.zeros(1))
        assert error.value.filename == str(tmp_path) and store.used["disk"] == 2**16
        assert column[slice(0, 2**14)].sum() == 2**14
    assert list(tmp_path.iterdir()) == []


# Rows


@pytest.fixture
def values(generator):
    return torch.randn(6, 4, 4, generator=generator)


@pytest.fixture
def column(values):
    column = Store(CPU).column(6, values)
    column[slice(0, 6)] = values
    return column


OTHER = torch.linspace(0.5, 2, 48).view(3, 4, 4)
USES = {
    "cat": lambda r: torch.cat([r, OTHER], dim=1),
    "stack": lambda r: torch.stack((OTHER, r)),
    "where": lambda r: torch.where(OTHER > 1, r, OTHER),
    "functional": F.silu,
    "keyword": lambda r: F.linear(OTHER, weight=r[0]),
    "out-of-place method of another": lambda r: OTHER.add(r, alpha=2),
    "in-place method of another": lambda r: OTHER.clone().mul_(r),
    "own method": lambda r: r.flatten(1).softmax(-1),
    "method with rows": lambda r: r.add(r),
    "attributes": lambda r: torch.tensor([*r.shape, r.dim(), r.requires_grad, r.is_floating_point()]),
    "module": torch.nn.Softmax(dim=1),
    "index": lambda r: r[:, 1:],
    "index of rows": lambda r: r[OTHER > 1],
    "iteration": lambda r: torch.stack([part * 2 for part in r]),
    "length": lambda r: torch.tensor(len(r)),
    "negation": lambda r: -r,
    "absolute": abs,
    "+=": lambda r: OTHER.clone().__iadd__(r),
}
OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "**": lambda a, b: abs(a) ** b,
    "@": lambda a, b: a @ b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
}


def assert_same(found, expected):
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("rows", [torch.tensor([5, 0, 2]), slice(1, 4)], ids=["index", "slice"])
def test_rows_stand_for_their_tensor(column, values, rows, use):
    assert_same(use(Rows(column, rows)), use(values[rows]))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_rows_stand_on_both_sides_of_operators(column, values, operator):
    index = torch.tensor([5, 0, 2])
    rows, tensor = Rows(column, index), values[index]
    for a, b in ((rows, OTHER), (OTHER, rows), (rows, rows)):
        assert_same(operator(a, b), operator(*(tensor if x is rows else x for x in (a, b))))


@pytest.mark.parametrize("operator", ["+", "-", "*", "/", "**", "<"])
def test_rows_and_numbers(column, values, operator):
    rows, use = Rows(column, slice(0, 6)), OPERATORS[operator]
    assert_same(use(rows, 3), use(values, 3))
    assert_same(use(3, rows), use(3, values))


def test_rows_are_read_once_and_only_if_used(column, values, monkeypatch):
    reads, read = [], Column.__getitem__
    monkeypatch.setattr(Column, "__getitem__", lambda self, rows: (reads.append(rows), read(self, rows))[1])
    unused, used = Rows(column, slice(0, 2)), Rows(column, slice(2, 4))
    assert reads == []
    assert torch.equal(used + used, 2 * values[2:4]) and torch.equal(used.tensor, values[2:4])
    assert used.shape == (2, 4, 4) and reads == [slice(2, 4)]
    assert unused.column is column and len(reads) == 1


def test_rows_are_read_in_lists_and_tuples_too(column, values):
    rows = Rows(column, slice(0, 2))
    found = read_rows((rows, [rows, 3], None, OTHER))
    assert isinstance(found, tuple) and isinstance(found[1], list)
    assert torch.equal(found[0], values[:2]) and torch.equal(found[1][0], values[:2])
    assert found[1][1:] == [3] and found[2] is None and found[3] is OTHER


# Leaves


def test_every_leaf_of_a_state_is_mapped_and_what_is_missing_stays_missing():
    state, seen = State(1, (2, (3, 4))), []
    found = map_leaves(state, lambda leaf: (seen.append(leaf), 10 * leaf)[1])
    assert found == State(10, (20, (30, 40))) and seen == [1, 2, 3, 4]
    assert state == State(1, (2, (3, 4)))
    assert map_leaves(State(0, (), 5), lambda leaf: leaf + 1) == State(1, (), 6)
