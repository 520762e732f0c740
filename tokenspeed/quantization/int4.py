"""int4 weights: four-bit codes in groups of 128 columns, each with a scale and, where a file has it, a zero point."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.quantization.nibbles import WORD, pack_nibbles, unpack_nibbles
from tokenspeed.quantization.parts import finite, inverse, parts, whole_groups

FORMAT = "I4_G128"
"""Name of the stored format."""
GROUP = 128
"""Columns that share a scale."""
ZERO = 8
"""The code of 0 where there are no zero points."""
LARGEST = 7


@dataclass(frozen=True)
class Int4Weight:
    """q: int32 [N, K / 8], codes as `nibbles` lays them out. scale: bfloat16 [K / 128, N], so that neighbouring rows
    lie side by side. zero: uint8 [K / 128, N], the code of 0 in each group, or None where it is 8 everywhere. The value
    is (code - zero) * scale."""

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, words = self.q.shape
        groups = (words * WORD // GROUP, rows)
        whole_groups(words * WORD, GROUP, "int4")
        zero_fits = self.zero is None or (self.zero.dtype, tuple(self.zero.shape)) == (torch.uint8, groups)
        scale_fits = (self.scale.dtype, tuple(self.scale.shape)) == (torch.bfloat16, groups)
        if self.q.dtype != torch.int32 or not scale_fits or not zero_fits:
            zero = "none" if self.zero is None else f"{self.zero.dtype} {tuple(self.zero.shape)}"
            raise UnsupportedError(
                f"int4 weight {self.q.dtype} {tuple(self.q.shape)} with scales {self.scale.dtype} "
                f"{tuple(self.scale.shape)} and zero points {zero} (supported: torch.int32 with scales torch.bfloat16 "
                f"{groups} and zero points torch.uint8 {groups} or none)"
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.q.shape[0], self.q.shape[1] * WORD))

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """(code - zero) * scale, rounded once: [N, K] of `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        codes = unpack_nibbles(self.q).to(wide).unflatten(1, (-1, GROUP))
        zero = ZERO if self.zero is None else self.zero.t()[:, :, None].to(wide)
        return ((codes - zero) * self.scale.t()[:, :, None].to(wide)).flatten(1).to(dtype)


def int4_weight(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> Int4Weight:
    """From codes 0..15 [N, K] with scales and zero points [N, K / 128] of any type, as files have them.

    Raises UnsupportedError where the columns are no whole groups.
    """
    whole_groups(codes.shape[1], GROUP, "int4")
    turned = None if zero is None else zero.t().to(torch.uint8).contiguous()
    return Int4Weight(pack_nibbles(codes), scale.t().to(torch.bfloat16).contiguous(), turned)


def quantize_int4(weight: torch.Tensor) -> Int4Weight:
    """Weights [N, K] of any float dtype, symmetric: scale = absmax / 7 of each group, rounded to bfloat16; codes are
    the nearest for the rounded scale, so off by half of it at most.

    Raises UnsupportedError where the columns are no whole groups, WeightError for values that are not finite.
    """
    rows, cols = weight.shape
    whole_groups(cols, GROUP, "int4")
    q = torch.empty(rows, cols // WORD, dtype=torch.int32, device=weight.device)
    scale = torch.empty(cols // GROUP, rows, dtype=torch.bfloat16, device=weight.device)
    for start, part in parts(weight):
        grouped, end = part.view(len(part), -1, GROUP), start + len(part)
        step = finite((grouped.abs().amax(2) / LARGEST).to(torch.bfloat16))
        scale[:, start:end] = step.t()
        codes = (grouped * inverse(step.float())[:, :, None]).round_().clamp_(-ZERO, LARGEST).add_(ZERO)
        q[start:end] = pack_nibbles(codes.flatten(1).to(torch.uint8))
    return Int4Weight(q, scale)
