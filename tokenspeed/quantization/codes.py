"""Rows of a quantised matrix as files have them, whatever their layout: codes, scales, zero points."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NIBBLE_ZERO = 8
"""The code of 0 of four-bit codes without zero points."""


@dataclass(frozen=True)
class Codes:
    """Values are (code - zero) * scale.

    codes: [N, K], e4m3, int8, or uint8 of four-bit codes 0..15. scale: of any float type, [N / block[0], K / block[1]],
    both rounded up: block is how many rows and columns share one. zero: integers of the shape of scale or None: 8 of
    four-bit codes, else 0.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int]
    zero: torch.Tensor | None = None

    @property
    def nibbles(self) -> bool:
        return self.codes.dtype == torch.uint8

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, K] of `dtype`, computed in float32, or in float64 where that is asked for, and rounded once."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        codes = self.codes.to(wide)
        if self.zero is not None:
            codes -= self._spread(self.zero.to(wide))
        elif self.nibbles:
            codes -= NIBBLE_ZERO
        return codes.mul_(self._spread(self.scale.to(wide))).to(dtype)

    def _spread(self, factors: torch.Tensor) -> torch.Tensor:
        """Of each element the factor of its block: [N, K], or what broadcasts to it."""
        for axis, (size, step) in enumerate(zip(self.codes.shape, self.block, strict=True)):
            if factors.shape[axis] > 1:
                factors = factors.repeat_interleave(step, axis).narrow(axis, 0, size) if step > 1 else factors
        return factors

    def rows(self, order: torch.Tensor) -> Codes:
        """The rows in another order; scales must be those of single rows or of all."""
        assert self.scale.shape[0] in (1, len(self.codes))
        scale, zero = (_picked(each, order) for each in (self.scale, self.zero))
        assert scale is not None
        # Not every device picks rows of e4m3.
        codes = self.codes.view(torch.uint8)[order].view(self.codes.dtype)
        return Codes(codes, scale, self.block, zero)

    def by_row(self) -> Codes:
        """The same with scales [N, groups], where one was for all rows."""
        if self.scale.shape[0] == self.codes.shape[0]:
            return self
        count = self.codes.shape[0]
        zero = None if self.zero is None else self.zero.expand(count, -1)
        return Codes(self.codes, self.scale.expand(count, -1), (1, self.block[1]), zero)


def _picked(factors: torch.Tensor | None, order: torch.Tensor) -> torch.Tensor | None:
    return factors if factors is None or factors.shape[0] == 1 else factors[order]
