"""Floating point to packed rows: what `--quantization` does at load. Layouts as in `quantization.unpack`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenspeed.contracts.errors import WeightError
from tokenspeed.formats.blocks import BLOCKS, row_bytes

CHUNK_ELEMENTS = 1 << 17
"""Elements packed at a time: 512 KiB of float32, small enough for a second-level cache."""


def pack(values: torch.Tensor, fmt: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of blocks, uint8 [rows, row_bytes(fmt, cols)], from floating point [rows, cols]; into `out` where given.

    Codes are the nearest for the float16 factors as they are stored. With d the factor of a block: Q8_0 is off by at
    most d / 2, Q4_1 by d / 2 and the rounding of the factors (2^-11 of the block's largest magnitude each).
    Raises WeightError for values that are not finite or too large for float16 factors, KeyError for other formats,
    FormatError when the columns are no whole blocks.
    """
    rows, cols = values.shape
    if out is None:
        out = torch.empty(rows, row_bytes(fmt, cols), dtype=torch.uint8, device=values.device)
    elements, size = BLOCKS[fmt]
    step = max(1, CHUNK_ELEMENTS // cols)
    for start in range(0, rows, step):
        blocks = values[start : start + step].float().reshape(-1, elements)
        _PACKERS[fmt](blocks, out[start : start + step].view(-1, size))
    return out


def _put_factor(out: torch.Tensor, at: int, factors: torch.Tensor) -> torch.Tensor:
    """Round factors [blocks] to float16, store them at byte `at`; what was stored, float32 [blocks, 1]."""
    halves = factors.half()
    if not halves.isfinite().all():
        raise WeightError("values that are not finite, or too large to be quantised")
    out[:, at : at + 2] = halves.unsqueeze(1).view(torch.uint8)
    return halves.float().unsqueeze(1)


def _inverse(step: torch.Tensor) -> torch.Tensor:
    return torch.where(step == 0, 0.0, 1.0 / step)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 [blocks, 32] to bytes [blocks, 16]: elements 0..15 low, 16..31 high."""
    codes = codes.to(torch.uint8)
    return codes[:, :16] | codes[:, 16:] << 4


def _pack_q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low, high = torch.aminmax(blocks, dim=1)
    step = _put_factor(out, 0, torch.maximum(high, -low) / 127)
    out[:, 2:] = (blocks * _inverse(step)).round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)


def _pack_q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low, high = torch.aminmax(blocks, dim=1)
    least = _put_factor(out, 2, low)
    step = _put_factor(out, 0, (high - least[:, 0]) / 15)
    out[:, 4:] = _nibbles(((blocks - least) * _inverse(step)).round_().clamp_(0, 15))


_PACKERS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "Q8_0": _pack_q8_0,
    "Q4_1": _pack_q4_1,
}
