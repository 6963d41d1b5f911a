"""How integers lie in memory while a network runs: weights by rows of the product, activations as signed bytes.

A weight [O, C, kh, kw] is stored as [O, kh, kw, C], so that the product's inner dimension (tap, channel) is contiguous.
Grids of more than 4 bits take a byte per code. Smaller ones take half a byte: byte j of a tap holds channel j in its
low half and channel ceil(C / 2) + j in its high half, so that both halves of a block of bytes are contiguous channels
and unpacking is one `and` and one shift, without moving anything between lanes.

Activations are stored as code - 128 where the codes exceed a signed byte, else as they are; the grid's zero point is
shifted with them, so kernels know one kind of grid only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.nn.grid import Grid

NIBBLE_BITS = 4  # the widest grid of which a byte holds two codes
BYTE_MIN, BYTE_MAX = -128, 127
MAX_DEPTH = 33000  # 255 * 255 * depth has to fit int32


class KernelWeight(nn.Module):
    """The codes of one product's weight as kernels read them; value = (stored code - zero) * scale.

    codes: [O, kh, kw, C] int8, or [O, kh, kw, ceil(C / 2)] uint8 (two codes a byte, see above). scale: [O] float32.
    zero: [O] int32, what is left of the zero points, or None where the stored codes are already centred.
    """

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None, channels: int) -> None:
        super().__init__()
        self.channels, self.nibbles = channels, codes.dtype == torch.uint8
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @classmethod
    def make(cls, codes: Tensor, grid: Grid) -> KernelWeight:
        """codes: integers [O, C], [O, C, k] or [O, C, kh, kw] on `grid`, whose tensors are [O].

        Raises ValueError where a product with 8-bit activations would not fit 32 bits.
        """
        depth = codes[0].numel()
        if depth > MAX_DEPTH:
            raise ValueError(f"integer product: expected at most {MAX_DEPTH} weights per output, found {depth}")
        rows, channels = codes.shape[:2]
        taps = codes.reshape(rows, channels, *[1] * (4 - codes.dim()), *codes.shape[2:])
        taps = taps.permute(0, 2, 3, 1).to(torch.int16)
        scale, zero = grid.scale.float().contiguous(), grid.zero_point.to(torch.int32)
        if grid.spec.bits <= NIBBLE_BITS:
            stored, zero = _pack_nibbles(taps - grid.spec.qmin), zero - grid.spec.qmin
        else:
            stored, zero = _signed_bytes(taps, zero)
        return cls(stored, scale, zero.contiguous() if bool(zero.any()) else None, channels)

    @property
    def kernel_size(self) -> tuple[int, int]:
        """(kh, kw); (1, 1) for a linear layer."""
        return self.codes.shape[1], self.codes.shape[2]

    @property
    def outputs(self) -> int:
        """O, the output channels."""
        return self.codes.shape[0]

    def centred(self) -> Tensor:
        """Stored codes minus their zero points, [O, kh, kw, C] int32: what the product multiplies with."""
        codes = self.codes
        if self.nibbles:
            codes = torch.cat([codes & 15, codes >> 4], -1)[..., : self.channels]
        zero = 0 if self.zero is None else self.zero.view(-1, 1, 1, 1)
        return codes.to(torch.int32) - zero

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, [O, C, kh, kw]."""
        return (self.centred() * self.scale.view(-1, 1, 1, 1)).permute(0, 3, 1, 2).to(dtype)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """codes: [O, kh, kw, C] in 0 ... 15. Returns [O, kh, kw, ceil(C / 2)] uint8."""
    half = (codes.shape[-1] + 1) // 2
    low, high = codes[..., :half], codes[..., half:]
    high = nn.functional.pad(high, (0, half - high.shape[-1]))  # an odd channel more, which meets no activation
    return (low + 16 * high).to(torch.uint8).contiguous()


def _signed_bytes(codes: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """codes: [O, kh, kw, C] int16; zero: [O]. Returns them as int8, centred where that fits all, and the zeros left."""
    centred = codes - zero.view(-1, 1, 1, 1).to(codes.dtype)
    if int(centred.min()) >= BYTE_MIN and int(centred.max()) <= BYTE_MAX:
        return centred.to(torch.int8).contiguous(), torch.zeros_like(zero)
    shift = 128 if int(codes.max()) > BYTE_MAX else 0
    return (codes - shift).to(torch.int8).contiguous(), zero - shift


class ActGrid(nn.Module):
    """A grid of activations under one scale per parameter set, for codes stored as signed bytes (or wider, in `shift`).

    scale: [groups] float32; zero: [groups] int32, the stored code of value 0; qmin, qmax: ends of the stored codes.
    """

    def __init__(self, grid: Grid) -> None:
        """grid: with parameter sets, [groups], and its own codes. Raises ValueError for a grid per input channel, whose
        scales cannot be taken out of a product."""
        super().__init__()
        scale, spec = grid.scale, grid.spec
        if scale.dim() != 1:
            raise ValueError(f"integer activations: expected one scale per parameter set, found {list(scale.shape)}")
        self.bits = spec.bits
        shift = 2 ** (spec.bits - 1) if spec.qmax >= 2 ** (max(spec.bits, 8) - 1) else 0
        self.qmin, self.qmax = spec.qmin - shift, spec.qmax - shift
        self.register_buffer("scale", scale.float().contiguous())
        self.register_buffer("zero", grid.zero_point.to(torch.int32).contiguous() - shift)
        self.centred = not bool(self.zero.any())  # asked once: kernels then leave the correction out

    def same_as(self, other: ActGrid) -> bool:
        """Whether both give the same codes for every input, in every parameter set."""
        ends = (self.qmin, self.qmax) == (other.qmin, other.qmax)
        return ends and torch.equal(self.scale, other.scale) and torch.equal(self.zero, other.zero)
