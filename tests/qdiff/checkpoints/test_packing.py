"""Packed integer codes: the layout at 4 bits, and that packing loses nothing."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from qdiff.checkpoints.packing import pack_codes, packed_bytes, unpack_codes
from qdiff.recipes.recipe import QuantSpec


@st.composite
def coded(draw):
    """(codes, bits, qmin) of any shape, also empty and scalar."""
    bits = draw(st.integers(1, 8))
    qmin = draw(st.sampled_from([0, -(2 ** (bits - 1))]))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    count = int(torch.tensor(shape).prod()) if shape else 1
    codes = draw(st.lists(st.integers(qmin, qmin + 2**bits - 1), min_size=count, max_size=count))
    return torch.tensor(codes, dtype=torch.int16).view(shape), bits, qmin


@given(coded())
def test_unpacking_undoes_packing(case):
    codes, bits, qmin = case
    packed = pack_codes(codes, bits, qmin)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(codes.numel(), bits),)
    back = unpack_codes(packed, bits, codes.shape, qmin)
    assert back.dtype == (torch.uint8 if qmin == 0 else torch.int8)
    assert torch.equal(back.short(), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32], ids=str)
def test_two_codes_of_4_bits_share_a_byte_low_half_first(dtype):
    packed = pack_codes(torch.tensor([0x1, 0x2, 0xF, 0x0, 0x7], dtype=dtype), 4)
    assert packed.tolist() == [0x21, 0x0F, 0x07]


@given(coded())
def test_the_stream_is_the_low_bits_of_each_code_in_turn(case):
    codes, bits, qmin = case
    stream = "".join(f"{code - qmin:0{bits}b}"[::-1] for code in codes.flatten().tolist())
    stream += "0" * (-len(stream) % 8)
    expected = [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]
    assert pack_codes(codes, bits, qmin).tolist() == expected


def test_signed_codes_are_stored_from_their_smallest_on():
    assert pack_codes(torch.tensor([-8, 7, -1, 0]), 4, qmin=-8).tolist() == [0xF0, 0x87]


def test_three_bits_run_across_bytes():
    bits = "".join(f"{byte:08b}"[::-1] for byte in pack_codes(torch.tensor([1, 2, 4, 7, 5]), 3).tolist())
    assert [int(bits[i : i + 3][::-1], 2) for i in range(0, 15, 3)] == [1, 2, 4, 7, 5]
    assert packed_bytes(5, 3) == 2


@pytest.mark.parametrize(("codes", "qmin"), [([0, 16], 0), ([-1, 3], 0), ([-9], -8), ([8], -8)])
def test_codes_that_do_not_fit_are_refused(codes, qmin):
    with pytest.raises(ValueError, match=f"4 bits from {qmin} on: found codes {min(codes)} ... {max(codes)}"):
        pack_codes(torch.tensor(codes), 4, qmin)


@pytest.mark.parametrize("count", [2, 4], ids=["too-few", "too-many"])
def test_a_wrong_number_of_bytes_is_refused(count):
    with pytest.raises(ValueError, match=f"6 codes of 4 bits: expected 3 bytes, found {count}"):
        unpack_codes(torch.zeros(count, dtype=torch.uint8), 4, (2, 3))


@pytest.mark.parametrize("kind", ["affine", "signed"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_both_ends_of_a_grid_survive(kind, bits):
    spec = QuantSpec(bits, kind)
    ends = torch.tensor([spec.qmin, spec.qmax, spec.qmin])
    assert unpack_codes(pack_codes(ends, bits, spec.qmin), bits, ends.shape, spec.qmin).tolist() == ends.tolist()
