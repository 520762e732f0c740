"""Weights as plain values of any type, one matrix or a part of one at a time: those a backend holds, or a file's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts
from tokenspeed.quantization.narrow import Narrow
from tokenspeed.weights.packed import PackedTensor, Weight

PIECE = 1 << 23
"""Values that are unpacked at a time."""


class Values(Protocol):
    """Where references take weights from."""

    def vector(self, name: str) -> torch.Tensor:
        """float32 [columns]."""
        ...

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """All rows of a matrix [rows, columns], some at a time."""
        ...

    def some(self, name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of a matrix by number."""
        ...

    def expert(self, name: str, number: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrix, or the bias, of one expert."""
        ...

    def rounds_rows(self, name: str) -> bool:
        """Whether kernels may round the rows that this matrix multiplies to e4m3."""
        ...


class HeldWeights:
    """Those of a GPU's backend."""

    def __init__(self, held: Mapping[str, torch.Tensor | Narrow]) -> None:
        self._held = held

    def vector(self, name: str) -> torch.Tensor:
        return self._plain(name).float()

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        held = self._held[name]
        if not isinstance(held, torch.Tensor):
            yield held.dequantized(dtype)
            return
        for part in held.split(max(1, PIECE // held.shape[-1])):
            yield part.to(dtype)

    def some(self, name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._plain(name)[ids].to(dtype)

    def expert(self, name: str, number: int, dtype: torch.dtype) -> torch.Tensor:
        held = self._held[name]
        if isinstance(held, Fp8Weight):
            return Fp8Weight(held.q[number], held.scale[number]).dequantized(dtype)
        if isinstance(held, Mxfp4Experts):
            one = slice(number, number + 1)
            return Mxfp4Experts(held.q[one], held.scale[one], held.cols).dequantized(dtype)[0]
        return self._plain(name)[number].to(dtype)

    def rounds_rows(self, name: str) -> bool:
        return isinstance(self._held[name], Fp8Weight)

    def _plain(self, name: str) -> torch.Tensor:
        held = self._held[name]
        assert isinstance(held, torch.Tensor), f"{name} is narrow"
        return held


class PackedWeights:
    """Those of a file, or quantised as a file's; unpacked on `device`."""

    def __init__(self, packed: Mapping[str, Weight], device: torch.device) -> None:
        self._packed, self._device = packed, device

    def vector(self, name: str) -> torch.Tensor:
        return self._packed[name].unpacked(torch.float32).to(self._device)

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        for segment in self._packed[name].segments:
            step = max(1, PIECE // segment.cols // segment.unit) * segment.unit
            for first in range(0, segment.rows, step):
                yield self._rows(segment, first, min(first + step, segment.rows), dtype)

    def some(self, name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([self._range(name, row, row + 1, dtype)[0] for row in ids.tolist()])

    def expert(self, name: str, number: int, dtype: torch.dtype) -> torch.Tensor:
        weight = self._packed[name]
        if len(weight.shape) == 2:
            return self.vector(name).view(weight.shape)[number].to(dtype)
        rows = weight.shape[1]
        return self._range(name, number * rows, (number + 1) * rows, dtype)

    def rounds_rows(self, name: str) -> bool:
        return False

    def _range(self, name: str, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows [first, last) of all segments together."""
        parts, start = [], 0
        for segment in self._packed[name].segments:
            low, high = max(first - start, 0), min(last - start, segment.rows)
            if low < high:
                begin = low // segment.unit * segment.unit
                end = min(-(-high // segment.unit) * segment.unit, segment.rows)
                parts.append(self._rows(segment, begin, end, dtype)[low - begin : high - begin])
            start += segment.rows
        return torch.cat(parts)

    def _rows(self, segment: PackedTensor, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(last - first, segment.cols, dtype=dtype, device=self._device)
        segment.unpack_rows(first, last, dtype, out)
        return out
