"""Integer codes as a dense bit stream: the low bits of each code follow one another, little end first.

At 4 bits that is two codes to a byte, the first in the low half.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int, qmin: int = 0) -> Tensor:
    """codes: integers in [qmin, qmin + 2^bits - 1], any shape, bits 1 ... 8. Returns [bytes] uint8.

    Raises ValueError for codes outside that range.
    """
    levels = codes.flatten().to(torch.int16) - qmin
    if levels.numel() and (int(levels.min()) < 0 or int(levels.max()) >= 2**bits):
        found = f"{int(codes.min())} ... {int(codes.max())}"
        raise ValueError(f"codes of {bits} bits from {qmin} on: found codes {found}")
    levels = levels.to(torch.uint8).cpu()
    if 8 % bits == 0:
        return _pack_whole(levels, bits)
    planes = np.unpackbits(levels.numpy()[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def _pack_whole(levels: Tensor, bits: int) -> Tensor:
    """Of codes none of which runs across bytes, without a byte for every bit."""
    each = 8 // bits
    rows = F.pad(levels, (0, -len(levels) % each)).view(-1, each)
    packed = rows[:, 0].clone()
    for place in range(1, each):
        packed |= rows[:, place] << bits * place
    return packed


def check_packed(packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...]) -> None:
    """Raise ValueError unless `packed` has as many bytes as codes of that shape take."""
    count = int(np.prod(shape))
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits: expected {packed_bytes(count, bits)} bytes, found {packed.numel()}"
        )


def unpack_codes(packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...], qmin: int = 0) -> Tensor:
    """The inverse of `pack_codes`: integers of the given shape, uint8 for qmin = 0 and int8 otherwise.

    Raises ValueError when the number of bytes does not fit.
    """
    check_packed(packed, bits, shape)
    count = int(np.prod(shape))
    packed = packed.cpu()
    if 8 % bits == 0:
        places = [packed >> bits * place & 2**bits - 1 for place in range(8 // bits)]
        levels = torch.stack(places, 1).flatten()[:count]
    else:
        planes = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
        levels = torch.from_numpy(np.packbits(planes, axis=1, bitorder="little")[:, 0])
    levels = levels.view(tuple(shape))
    return levels if qmin == 0 else (levels.to(torch.int16) + qmin).to(torch.int8)
