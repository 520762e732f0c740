"""int4 weights: four-bit codes in groups of 128, 64 or 32 columns, each with a scale and, where a file has it, a zero
point."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.quantization.nibbles import WORD, pack_nibbles, unpack_nibbles
from tokenspeed.quantization.parts import finite, inverse, parts, whole_groups

FORMAT = "I4_G128"
"""Name of the stored format."""
GROUP = 128
"""Columns that share a scale, but for files with smaller groups; of those whole runs of 128."""
GROUPS = (128, 64, 32)
SCALES = (torch.bfloat16, torch.float16, torch.float32)
"""Types of scales: files' own are kept, ours are the first."""
ZERO = 8
"""The code of 0 where there are no zero points."""
LARGEST = 7


@dataclass(frozen=True)
class Int4Weight:
    """q: int32 [N, K / 8], codes as `nibbles` lays them out. scale: [K / 128, N], so that neighbouring rows lie side by
    side, or of groups of 64 and 32 [K / 128, N, 2 or 4]; of a type of SCALES. zero: uint8 of the shape of scale, the
    code of 0 in each group, or None where it is 8 everywhere. The value is (code - zero) * scale."""

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, words = self.q.shape
        runs = (words * WORD // GROUP, rows)
        allowed = (runs, (*runs, 2), (*runs, 4))
        whole_groups(words * WORD, GROUP, "int4")
        zero_fits = self.zero is None or (self.zero.dtype, self.zero.shape) == (torch.uint8, self.scale.shape)
        scale_fits = self.scale.dtype in SCALES and tuple(self.scale.shape) in allowed
        if self.q.dtype != torch.int32 or not scale_fits or not zero_fits:
            zero = "none" if self.zero is None else f"{self.zero.dtype} {tuple(self.zero.shape)}"
            raise UnsupportedError(
                f"int4 weight {self.q.dtype} {tuple(self.q.shape)} with scales {self.scale.dtype} "
                f"{tuple(self.scale.shape)} and zero points {zero} (supported: torch.int32 with scales "
                f"{', '.join(map(str, SCALES))} {', '.join(map(str, allowed))} and zero points torch.uint8 of the same "
                "shape or none)"
            )

    @property
    def per_run(self) -> int:
        """Groups of 128 columns: 1, 2 or 4."""
        return 1 if self.scale.dim() == 2 else self.scale.shape[2]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.q.shape[0], self.q.shape[1] * WORD))

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """(code - zero) * scale, rounded once: [N, K] of `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        codes = unpack_nibbles(self.q).to(wide).unflatten(1, (-1, GROUP // self.per_run))
        zero = ZERO if self.zero is None else _by_row(self.zero).to(wide)
        return ((codes - zero) * _by_row(self.scale).to(wide)).flatten(1).to(dtype)


def _by_row(factors: torch.Tensor) -> torch.Tensor:
    """[runs, N] or [runs, N, groups] to [N, all groups, 1]."""
    return factors.transpose(0, 1).flatten(1)[:, :, None]


def _by_run(factors: torch.Tensor, runs: int) -> torch.Tensor:
    """[N, groups] to [runs, N], or [runs, N, groups of a run]."""
    split = factors.unflatten(1, (runs, -1)).transpose(0, 1)
    return (split[..., 0] if split.shape[2] == 1 else split).contiguous()


def int4_weight(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> Int4Weight:
    """From codes 0..15 [N, K] with scales and zero points [N, K / group], as files have them; scales keep a type of
    SCALES.

    Raises UnsupportedError where the columns are no whole runs of 128.
    """
    runs = codes.shape[1] // GROUP
    whole_groups(codes.shape[1], GROUP, "int4")
    turned = None if zero is None else _by_run(zero.to(torch.uint8), runs)
    return Int4Weight(pack_nibbles(codes), _by_run(scale, runs), turned)


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
