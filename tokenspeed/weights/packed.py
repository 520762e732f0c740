"""Weights as the engine holds them: bytes in the file's own format until a kernel, or the reference, unpacks them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.quantization.unpack import unpack
from tokenspeed.weights.spec import WeightSpec


@dataclass(frozen=True)
class PackedTensor:
    """Rows of one format: `data` is uint8 [rows, row_bytes(fmt, cols)]. Never write to it: it may be a file's map."""

    data: torch.Tensor
    fmt: str
    rows: int
    cols: int

    @property
    def nbytes(self) -> int:
        return self.data.numel()


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
        rows, cols = sum(segment.rows for segment in self.segments), self.shape[-1]
        out = torch.empty(rows, cols, dtype=dtype, device=self.segments[0].data.device)
        start = 0
        for segment in self.segments:
            unpack(segment.data, segment.fmt, cols, dtype, out[start : start + segment.rows])
            start += segment.rows
        return out.view(self.shape)


def vector_weight(spec: WeightSpec, values: torch.Tensor) -> Weight:
    """A weight of kind vector from float32 values [cols]."""
    return Weight(spec, [PackedTensor(values.view(torch.uint8).unsqueeze(0), "F32", 1, values.numel())])


def share_bytes(array: npt.NDArray[np.uint8]) -> torch.Tensor:
    """A uint8 tensor over the array's own memory, read-only memory included.

    torch has no read-only tensors and warns about such memory; writing to the result would be a segmentation fault.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(array)
