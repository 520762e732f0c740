"""Weights as the engine holds them: bytes in the file's own format until a kernel, or the reference, unpacks them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.formats.checkpoint import Bytes, drop_pages
from tokenspeed.quantization.unpack import unpack
from tokenspeed.weights.spec import WeightSpec

PLAIN_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Of one value."""
_WORDS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class PackedTensor:
    """Rows of one format: `data` is uint8 [rows, row_bytes(fmt, cols)]. Never write to it: it may be a file's map."""

    data: torch.Tensor
    fmt: str
    rows: int
    cols: int
    heads: int = 0
    """More than 0: data holds the rows of so many heads in interleaved pairs; `rows_at` undoes that."""
    turned: int = 0
    """Of each head the first so many rows are; 0 for all."""
    mapped: Bytes | None = None
    """The bytes of `data` as a view of the file's map, where they are one."""
    exchanged: int = 0
    """More than 0: data holds so many matrices of a plain format, each with rows and columns exchanged: a line of it
    has one column of a matrix."""

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def views(self) -> tuple[Bytes, ...]:
        """All bytes of the file's map that it holds."""
        return () if self.mapped is None else (self.mapped,)

    @property
    def unit(self) -> int:
        """Rows that are unpacked from a multiple of this on."""
        return 1

    def unpack_rows(self, first: int, last: int, dtype: torch.dtype, out: torch.Tensor) -> int:
        """Rows [first, last) into `out` [last - first, cols] of `dtype`; the packed bytes read."""
        data = self.rows_at(first, last)
        unpack(data.to(out.device), self.fmt, self.cols, dtype, out)
        return data.numel()

    def with_views(self, views: Sequence[torch.Tensor]) -> PackedTensor:
        """The same over copies of its `views`: uint8 [nbytes] each, on any device."""
        return replace(self, data=views[0].view(self.data.shape), mapped=None)

    def released(self) -> PackedTensor:
        """The same without data."""
        return replace(self, data=self.data.to("meta"), mapped=None)

    @property
    def lines(self) -> int:
        """Runs of bytes one after the other, each of which is a row, or of an exchanged matrix a column."""
        return self.exchanged * self.cols or self.rows

    def rows_at(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) in the program's order: uint8 [last - first, row bytes], a view where none is moved and
        values of a plain format lie on their alignment."""
        if self.exchanged:
            return self._rows_of_exchanged(self._origins(first, last))
        rows = self.data[self._origins(first, last)] if self.heads else self.data[first:last]
        return rows if rows.data_ptr() % PLAIN_BYTES.get(self.fmt, 1) == 0 else rows.clone()

    def _rows_of_exchanged(self, rows: torch.Tensor) -> torch.Tensor:
        each, size = self.rows // self.exchanged, PLAIN_BYTES[self.fmt]
        aligned = self.data.data_ptr() % size == 0
        values = self.data.view(_WORDS[size]) if aligned else self.data
        return (
            values.view(self.exchanged, self.cols, each, -1)[rows // each, :, rows % each].flatten(1).view(torch.uint8)
        )

    def places(self, first: int, last: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Where rows [first, last), counted as `data` has them, come to lie in the program's order: int64."""
        rows = torch.arange(first, last, device=device)
        within, turned = self._within_heads(rows)
        return rows - within + torch.where(within < turned, within % 2 * (turned // 2) + within // 2, within)

    def _origins(self, first: int, last: int) -> torch.Tensor:
        """The inverse of `places`: which rows of `data` are [first, last) in the program's order."""
        rows = torch.arange(first, last)
        within, turned = self._within_heads(rows)
        half = max(1, turned // 2)
        return rows - within + torch.where(within < turned, within % half * 2 + within // half, within)

    def _within_heads(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Each row's number within its head, and how many of a head are interleaved."""
        size = self.rows // max(1, self.heads)
        return rows % size, (self.turned or size) if self.heads else 0

    def drop_pages(self, first: int, last: int) -> None:
        """Give the file's pages of rows [first, last) back, where the data are its map; rows before are done with."""
        if self.mapped is None or self.exchanged:
            return
        head = self.rows // self.heads if self.heads else 1
        width = self.nbytes // self.rows
        drop_pages(self.mapped[first // head * head * width : last // head * head * width])


@dataclass(frozen=True)
class Weight:
    """One weight of the program: segments stacked along the rows, each in its own format.

    A weight of kind vector is a single segment of one F32 row.
    """

    spec: WeightSpec
    segments: list[PackedTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        """Bytes held, all segments together."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that occur, each once, in row order."""
        return tuple(dict.fromkeys(segment.fmt for segment in self.segments))

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """A fresh tensor of `shape` and `dtype`, on the device of the segments."""
        count, cols = sum(segment.rows for segment in self.segments), self.spec.cols
        out = torch.empty(count, cols, dtype=dtype, device=self.segments[0].data.device)
        start = 0
        for segment in self.segments:
            segment.unpack_rows(0, segment.rows, dtype, out[start : start + segment.rows])
            start += segment.rows
        return out.view(self.shape)


def unpermute_rope(rows: torch.Tensor, heads: int, turned: int = 0) -> torch.Tensor:
    """Reorder [heads * head_dim, ...] from interleaved pairs (x0, x1) per head to (first half, second half); a copy.
    turned: of each head the first so many rows alone, 0 for all.

    The inverse of what llama.cpp's converter does to Q and K of llama-architecture checkpoints (`permute` in
    convert_hf_to_gguf.py). Raises ValueError when the rows are not heads of an even size.
    """
    if heads < 1 or rows.shape[0] % heads or (turned or rows.shape[0] // heads) % 2:
        raise ValueError(f"{rows.shape[0]} rows are not {heads} heads of an even size")
    split = rows.reshape(heads, -1, *rows.shape[1:])
    turned = turned or split.shape[1]
    pairs = split[:, :turned].reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2)
    return torch.cat((pairs.reshape(heads, turned, *rows.shape[1:]), split[:, turned:]), dim=1).reshape(rows.shape)


def vector_weight(spec: WeightSpec, values: torch.Tensor) -> Weight:
    """A weight of kind vector from its float32 values, contiguous."""
    return Weight(spec, [PackedTensor(values.view(-1).view(torch.uint8).unsqueeze(0), "F32", 1, values.numel())])


def share_bytes(array: npt.NDArray[np.uint8]) -> torch.Tensor:
    """A uint8 tensor over the array's own memory, read-only memory included.

    torch has no read-only tensors and warns about such memory; writing to the result would be a segmentation fault.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(array)
