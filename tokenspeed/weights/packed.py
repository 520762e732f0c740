"""Weights as the engine holds them: bytes in the file's own format until a kernel, or the reference, unpacks them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.formats.checkpoint import Bytes, drop_pages
from tokenspeed.quantization.unpack import unpack
from tokenspeed.weights.spec import WeightSpec


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

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def unit(self) -> int:
        """Rows that are unpacked from a multiple of this on."""
        return 1

    def unpack_rows(self, first: int, last: int, dtype: torch.dtype, out: torch.Tensor) -> int:
        """Rows [first, last) into `out` [last - first, cols] of `dtype`; the packed bytes read."""
        data = self.rows_at(first, last)
        unpack(data.to(out.device), self.fmt, self.cols, dtype, out)
        return data.numel()

    def released(self) -> PackedTensor:
        """The same without data."""
        return replace(self, data=self.data.to("meta"), mapped=None)

    def rows_at(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) in the program's order: uint8 [last - first, row bytes], a view where none is moved."""
        if not self.heads:
            return self.data[first:last]
        return self.data[unpermute_rope(torch.arange(self.rows), self.heads, self.turned)[first:last]]

    def drop_pages(self, first: int, last: int) -> None:
        """Give the file's pages of rows [first, last) back, where the data are its map; rows before are done with."""
        if self.mapped is None:
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
