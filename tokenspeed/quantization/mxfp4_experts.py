"""MXFP4 weights of experts: e2m1 values in blocks of 32 columns with a power of two each (OCP Microscaling Formats
1.0), laid out so that a word, turned, and a mask give two codes of each of its four blocks.

A run of 128 columns is 16 words of 32 bits; word i holds columns 2i and 2i + 1 of each block. Turned left by 0, 6 and
12 bits, it has those of the first, second and third block where two bfloat16 have sign (bit 15), exponent and mantissa
(8 to 6), column 2i in the lower half; of the fourth, signs and exponents come there by 10 bits and mantissas by 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.quantization.mxfp4 import BIAS, BLOCK, BLOCKS, VALUES, quantize_mxfp4
from tokenspeed.quantization.nibbles import RUN, unpack_nibbles
from tokenspeed.quantization.parts import whole_groups

WORDS = RUN // 4
"""Of a run, of 16 bits."""
TURNS, LAST_TURN, LAST_MANTISSA_TURN = (0, 6, 12), 10, 2
MANTISSAS = 0x00400040
RAISED = 90
"""Added to stored exponents: with it a bfloat16 of such bits takes values of 2^-126 back to where kernels add them."""
LEAST, MOST = 31, 164
"""Exponents that can be stored: below, products of a code and its scale are no normal numbers; above, no byte."""


@dataclass(frozen=True)
class Mxfp4Experts:
    """q: int16 [E, N, ceil(K / 128) * 32], halves of words as above, zeros beyond the last column. scale: int32 [E,
    ceil(K / 128), N]: of each run and row the exponents of its four blocks, biased by 127 and RAISED, a byte each, the
    first lowest. cols: K, a multiple of 32. The value is that of the code times 2^(exponent - 127)."""

    q: torch.Tensor
    scale: torch.Tensor
    cols: int

    def __post_init__(self) -> None:
        whole_groups(self.cols, BLOCK, "mxfp4")
        (experts, rows), runs = self.q.shape[:2], -(-self.cols // RUN)
        words, scales = (experts, rows, runs * WORDS), (experts, runs, rows)
        given = (self.q.dtype, tuple(self.q.shape), self.scale.dtype, tuple(self.scale.shape))
        if given != (torch.int16, words, torch.int32, scales):
            raise UnsupportedError(
                f"mxfp4 experts of {self.cols} columns, {given[0]} {given[1]} with scales {given[2]} {given[3]} "
                f"(supported: torch.int16 {words} with scales torch.int32 {scales})"
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.q.shape[:2], self.cols))

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """value * 2^(exponent - 127), exact in bfloat16 and wider: [E, N, K] of `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        table = torch.tensor((*VALUES, *(-value for value in VALUES)), dtype=wide, device=self.q.device)
        experts, rows, _ = self.q.shape
        values = table[unpack_words(self.q).int()].view(experts, rows, -1, BLOCKS, BLOCK)
        stored = self.scale.view(torch.uint8).view(experts, -1, rows, BLOCKS).transpose(1, 2).to(torch.int32)
        return torch.ldexp(values, (stored - (RAISED + BIAS))[..., None]).flatten(2)[..., : self.cols].to(dtype)


def empty_experts(experts: int, rows: int, cols: int, device: torch.device) -> Mxfp4Experts:
    """Room for matrices [rows, cols]. Raises UnsupportedError where the columns are no whole blocks."""
    whole_groups(cols, BLOCK, "mxfp4")
    runs = -(-cols // RUN)
    q = torch.empty(experts, rows, runs * WORDS, dtype=torch.int16, device=device)
    return Mxfp4Experts(q, torch.empty(experts, runs, rows, dtype=torch.int32, device=device), cols)


def put_expert(given: Mxfp4Experts, expert: int, codes: torch.Tensor, exponents: torch.Tensor) -> None:
    """Write the matrix of an expert: codes 0..15 [N, K] and biased exponents [N, K / 32], integers, as files have them.

    Raises UnsupportedError for exponents that cannot be stored; those of blocks of zeros are free.
    """
    zeros = (codes.view(len(codes), -1, BLOCK) & 7).sum(2, dtype=torch.int32) == 0
    wide = torch.where(zeros, BIAS, exponents.to(torch.int32))
    low, high = int(wide.min()), int(wide.max())
    if low < LEAST or high > MOST:
        raise UnsupportedError(
            f"mxfp4 experts with scales of 2^{low - BIAS} to 2^{high - BIAS} "
            f"(supported: 2^{LEAST - BIAS} to 2^{MOST - BIAS})"
        )
    blocks = F.pad((wide + RAISED).to(torch.uint8), (0, -wide.shape[1] % BLOCKS))
    given.q[expert] = pack_words(F.pad(codes.to(torch.uint8), (0, -codes.shape[1] % RUN)))
    given.scale[expert] = blocks.view(len(codes), -1, BLOCKS).transpose(0, 1).contiguous().view(torch.int32)[..., 0]


def quantize_experts(weight: torch.Tensor) -> Mxfp4Experts:
    """Weights [E, N, K] of any float dtype as `quantize_mxfp4` rounds matrices. Raises its errors."""
    experts, rows, cols = weight.shape
    made = empty_experts(experts, rows, cols, weight.device)
    for expert, matrix in enumerate(weight):
        one = quantize_mxfp4(matrix)
        exponents = one.scale.transpose(0, 1).flatten(1)[:, : cols // BLOCK]
        # Values below 2^-93 become zeros.
        kept = (exponents >= LEAST).repeat_interleave(BLOCK, 1)
        put_expert(made, expert, unpack_nibbles(one.q)[:, :cols] * kept, exponents)
    return made


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15, uint8 [N, K] with K a multiple of 128, to int16 [N, K / 4]."""
    each = codes.to(torch.int32).view(codes.shape[0], -1, BLOCKS, WORDS // 2, 2)
    placed = (each >> 3) << 15 | (each & 7) << 6
    *first, last = (placed[..., 0] | placed[..., 1] << 16).unbind(2)
    words = _turned(last & ~MANTISSAS, -LAST_TURN) | _turned(last & MANTISSAS, -LAST_MANTISSA_TURN)
    for block, turn in zip(first, TURNS, strict=True):
        words |= _turned(block, -turn)
    return words.flatten(1).view(torch.int16)


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """int16 [..., W] to uint8 codes [..., 4 W] in the order of columns."""
    wide = words.contiguous().view(torch.int32).unflatten(-1, (-1, WORDS // 2))
    blocks = [_turned(wide, turn) for turn in TURNS]
    blocks.append(_turned(wide, LAST_TURN) & ~MANTISSAS | _turned(wide, LAST_MANTISSA_TURN) & MANTISSAS)
    bits = torch.stack(blocks, dim=-2)
    codes = torch.stack([(bits >> at + 15 & 1) << 3 | bits >> at + 6 & 7 for at in (0, 16)], dim=-1)
    return codes.flatten(-4).to(torch.uint8)


def _turned(words: torch.Tensor, left: int) -> torch.Tensor:
    """int32 words, their bits turned left by so many, or right by less than none."""
    left %= 32
    return words << left | words >> 32 - left & (1 << left) - 1 if left else words
