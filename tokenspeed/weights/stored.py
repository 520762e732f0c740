"""Rows of a quantised matrix as a checkpoint's layout keeps them, until a backend takes them or unpacks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.formats.checkpoint import Bytes, Checkpoint, drop_pages
from tokenspeed.formats.quantized.layout import Layout
from tokenspeed.formats.quantized.mxfp4 import BLOCK as MXFP4_BLOCK
from tokenspeed.formats.quantized.mxfp4 import Mxfp4Layout
from tokenspeed.quantization.codes import Codes
from tokenspeed.quantization.layouts import read_codes
from tokenspeed.weights.ahead import brought
from tokenspeed.weights.layouts import Stored
from tokenspeed.weights.packed import PackedTensor, Weight, share_bytes, unpermute_rope
from tokenspeed.weights.spec import Source

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
PART_ELEMENTS = 1 << 24
"""Unpacked at a time."""
UNIT = 128
"""Rows: every layout can be cut at multiples of it."""


@dataclass(frozen=True)
class StoredRows(PackedTensor):
    """`data` is that of the layout's marker; tensors: all of them by suffix, in their own types. name: the matrix."""

    stored: Stored | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    name: str = ""
    of_file: tuple[Bytes, ...] = ()

    @property
    def views(self) -> tuple[Bytes, ...]:
        return self.of_file

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def unit(self) -> int:
        return self.rows if self.heads else UNIT

    @property
    def layout(self) -> Layout:
        assert self.stored is not None
        return self.stored.layout

    def codes(self, first: int = 0, last: int | None = None, device: torch.device | str = "cpu") -> Codes:
        """Rows from a multiple of UNIT on, in the program's order, on `device`. Raises UnsupportedError naming the
        matrix where the layout cannot tell its values."""
        last = self.rows if last is None else last
        cut = {name: self._cut(name, first, last).to(device) for name in self.tensors}
        try:
            codes = read_codes(self.layout, cut, last - first, self.cols)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.name}: {error}") from None
        if not self.heads:
            return codes
        order = unpermute_rope(torch.arange(self.rows), self.heads, self.turned).to(device)
        return codes.rows(order)

    def _cut(self, suffix: str, first: int, last: int) -> torch.Tensor:
        assert self.stored is not None
        tensor, rule = self.tensors[suffix], self.stored.rules[suffix]
        axis, per = rule.axis, rule.per
        if tensor.dim() <= axis or tensor.shape[axis] != -(-self.rows // per):
            return tensor
        return tensor.narrow(axis, first // per, -(-last // per) - first // per)

    def unpack_rows(self, first: int, last: int, dtype: torch.dtype, out: torch.Tensor) -> int:
        out.copy_(self.codes(first, last, out.device).values(dtype))
        return self.nbytes * (last - first) // self.rows

    def with_views(self, views: Sequence[torch.Tensor]) -> StoredRows:
        old = zip(self.tensors.items(), views, strict=True)
        tensors = {suffix: view.view(tensor.dtype).view(tensor.shape) for (suffix, tensor), view in old}
        return replace(self, data=tensors[self.layout.marker], tensors=tensors, of_file=())

    def released(self) -> StoredRows:
        tensors = {suffix: tensor.to("meta") for suffix, tensor in self.tensors.items()}
        return replace(self, data=self.data.to("meta"), tensors=tensors, of_file=())

    def rows_at(self, first: int, last: int) -> torch.Tensor:
        raise UnsupportedError(f"{self.name}: rows of {self.fmt} have no bytes of their own")

    def drop_pages(self, first: int, last: int) -> None:
        """Only when the last rows are done with: parts of a tensor may lie anywhere in it."""
        if last == self.rows:
            for view in self.of_file:
                drop_pages(view)


@dataclass(frozen=True)
class Mxfp4Rows(PackedTensor):
    """gpt-oss's experts: `data` uint8 [rows, cols / 2], the low half of a byte first, beside exponents [rows, cols /
    32]; given as rows of ggml's MXFP4, which holds the same."""

    exponents: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    of_file: tuple[Bytes, ...] = ()

    @property
    def views(self) -> tuple[Bytes, ...]:
        return self.of_file

    @property
    def nbytes(self) -> int:
        return self.data.numel() + self.exponents.numel()

    def rows_at(self, first: int, last: int) -> torch.Tensor:
        rows = torch.arange(first, last)
        if self.heads:
            rows = unpermute_rope(torch.arange(self.rows), self.heads, self.turned)[first:last]
        codes, exponents = self.data[rows], self.exponents[rows]
        # Of a block's bytes the first halves are columns 0, 2, ..., as bytes of ggml's are 0 to 15 and 16 to 31.
        split = torch.stack((codes & 15, codes >> 4), dim=-1).view(*exponents.shape, 2, MXFP4_BLOCK // 2)
        blocks = torch.cat((exponents[:, :, None], split[:, :, 0] | split[:, :, 1] << 4), dim=2)
        return blocks.flatten(1)

    def with_views(self, views: Sequence[torch.Tensor]) -> Mxfp4Rows:
        data, exponents = views[0].view(self.data.shape), views[1].view(self.exponents.shape)
        return replace(self, data=data, exponents=exponents, of_file=())

    def released(self) -> Mxfp4Rows:
        return replace(self, data=self.data.to("meta"), exponents=self.exponents.to("meta"), of_file=())

    def drop_pages(self, first: int, last: int) -> None:
        """Only when the last rows are done with."""
        if last == self.rows:
            for view in self.of_file:
                drop_pages(view)


def is_stored(weight: Weight) -> bool:
    """Whether some of its rows come in a layout of a quantization_config."""
    return any(isinstance(segment, StoredRows | Mxfp4Rows) for segment in weight.segments)


def unpack_stored(
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Such weights by name, unpacked on `device` to `dtype`. progress: bytes done and in all."""
    total, done = sum(weight.nbytes for weight in weights.values()), 0
    for name, weight in brought(weights, device):
        out = torch.empty(weight.spec.rows, weight.spec.cols, dtype=dtype, device=device)
        start = 0
        for segment in weight.segments:
            rows = out[start : start + segment.rows]
            step = max(1, PART_ELEMENTS // segment.cols // segment.unit) * segment.unit
            for first in range(0, segment.rows, step):
                last = min(first + step, segment.rows)
                segment.unpack_rows(first, last, dtype, rows[first:last])
            segment.drop_pages(0, segment.rows)
            start += segment.rows
        yield name, out.view(weight.shape)
        done += weight.nbytes
        if progress is not None:
            progress(done, total)


def stored_rows(stored: Stored, source: Source, checkpoint: Checkpoint) -> PackedTensor:
    """Views of a matrix's tensors; copies of those that lie off their natural alignment."""
    tensors = {suffix: _tensor(checkpoint, name) for suffix, name in stored.tensors.items()}
    heads = source.heads if source.transform == "unpermute_rope" else 0
    data, layout = tensors[stored.layout.marker], stored.layout
    if isinstance(layout, Mxfp4Layout):
        kept = ("blocks", "scales")
        codes, exponents = (tensors[name].reshape(stored.rows, -1) for name in kept)
        views = tuple(checkpoint.data(stored.tensors[name]) for name in kept)
        return Mxfp4Rows(codes, layout.fmt, stored.rows, stored.cols, heads, source.turned, exponents=exponents,
            of_file=views,
        )  # fmt: skip
    views = tuple(checkpoint.data(name) for name in stored.tensors.values())
    return StoredRows(
        data, layout.fmt, stored.rows, stored.cols, heads, source.turned, stored=stored, tensors=tensors,
        name=source.name, of_file=views,
    )  # fmt: skip


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    info, dtype = checkpoint.tensors[name], DTYPES[checkpoint.tensors[name].dtype]
    data = share_bytes(checkpoint.data(name))
    data = data if data.data_ptr() % dtype.itemsize == 0 else data.clone()
    return data.view(dtype).view(info.shape)
