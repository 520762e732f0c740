"""MXFP4 weights: e2m1 values in blocks of 32 columns with a power of two each (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.quantization.nibbles import RUN, WORD, pack_nibbles, unpack_nibbles
from tokenspeed.quantization.parts import finite, parts, whole_groups

FORMAT = "E2M1_G32"
"""Name of the stored format, as ggml has it."""
BLOCK = 32
"""Columns that share a scale."""
BLOCKS = RUN // BLOCK
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of codes 0..7; codes 8..15 are the same with a minus."""
BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Halfway between neighbours."""
BIAS = 127
LEAST, MOST = 1, 253
"""Exponents given: e8m0's 0 would make steps that float32 has no normal numbers for, 254 values beyond it."""


@dataclass(frozen=True)
class Mxfp4Weight:
    """q: int32 [N, ceil(K / 128) * 16], codes as `nibbles` lays them out, zeros beyond the last column. scale: uint8
    [ceil(K / 128), N, 4]: of each run of 128 columns and row the exponents of its four blocks, biased by 127. cols: K,
    a multiple of 32. The value is that of the code times 2^(exponent - 127)."""

    q: torch.Tensor
    scale: torch.Tensor
    cols: int

    def __post_init__(self) -> None:
        whole_groups(self.cols, BLOCK, "mxfp4")
        rows, runs = self.q.shape[0], -(-self.cols // RUN)
        words, scales = (rows, runs * RUN // WORD), (runs, rows, BLOCKS)
        given = (self.q.dtype, tuple(self.q.shape), self.scale.dtype, tuple(self.scale.shape))
        if given != (torch.int32, words, torch.uint8, scales):
            raise UnsupportedError(
                f"mxfp4 weight of {self.cols} columns, {given[0]} {given[1]} with scales {given[2]} {given[3]} "
                f"(supported: torch.int32 {words} with scales torch.uint8 {scales})"
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.q.shape[0], self.cols))

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """value * 2^(exponent - 127), exact in bfloat16 and wider: [N, K] of `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        table = torch.tensor((*VALUES, *(-value for value in VALUES)), dtype=wide, device=self.q.device)
        blocks = table[unpack_nibbles(self.q).int()].unflatten(1, (-1, BLOCK))
        exponents = self.scale.transpose(0, 1).flatten(1).to(torch.int32) - BIAS
        return torch.ldexp(blocks, exponents[:, :, None]).flatten(1)[:, : self.cols].to(dtype)


def mxfp4_weight(codes: torch.Tensor, exponents: torch.Tensor) -> Mxfp4Weight:
    """From codes 0..15 [N, K] and biased exponents [N, K / 32], as files have them.

    Raises UnsupportedError where the columns are no whole blocks.
    """
    rows, cols = codes.shape
    whole_groups(cols, BLOCK, "mxfp4")
    padded = F.pad(codes.to(torch.uint8), (0, -cols % RUN))
    blocks = F.pad(exponents.to(torch.uint8), (0, -(cols // BLOCK) % BLOCKS))
    scale = blocks.view(rows, -1, BLOCKS).transpose(0, 1).contiguous()
    return Mxfp4Weight(pack_nibbles(padded), scale, cols)


def quantize_mxfp4(weight: torch.Tensor) -> Mxfp4Weight:
    """Weights [N, K] of any float dtype: a block's power of two is that below its largest magnitude, over 4, and values
    go to the nearest, ties to even codes. So they are off by half the distance of the neighbours, those beyond 6 by
    less than 2 times the scale. (A scale that clips nothing errs as much on normal weights, 5 % more on heavy-tailed
    ones.)

    Raises UnsupportedError where the columns are no whole blocks, WeightError for values that are not finite.
    """
    rows, cols = weight.shape
    whole_groups(cols, BLOCK, "mxfp4")
    runs = -(-cols // RUN)
    q = torch.empty(rows, runs * RUN // WORD, dtype=torch.int32, device=weight.device)
    scale = torch.empty(runs, rows, BLOCKS, dtype=torch.uint8, device=weight.device)
    for start, part in parts(weight):
        blocks, end = part.view(len(part), -1, BLOCK), start + len(part)
        exponents = _exponents(finite(blocks.abs().amax(2)))
        scaled = torch.ldexp(blocks, (BIAS - exponents)[:, :, None])
        packed = mxfp4_weight(_codes(scaled).flatten(1), exponents)
        q[start:end], scale[:, start:end] = packed.q, packed.scale
    return Mxfp4Weight(q, scale, cols)


def _exponents(largest: torch.Tensor) -> torch.Tensor:
    """Biased exponents, int32, of the powers of two by which the values come to lie between 4 and 8."""
    _, exponent = torch.frexp(largest)  # largest = fraction * 2^exponent with 0.5 <= fraction < 1
    return (exponent - 3 + BIAS).clamp_(LEAST, MOST)


def _codes(values: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest of VALUES; halfway, the even code."""
    magnitudes = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for code, bound in enumerate(BOUNDS):
        codes += (magnitudes > bound) if code % 2 == 0 else (magnitudes >= bound)
    return codes | values.signbit().to(torch.uint8) << 3
