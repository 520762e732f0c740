"""Pieces of packed weights that go through a reader's buffer, and where each belongs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tokenspeed.formats.checkpoint import file_part
from tokenspeed.quantization.unpack import unpack
from tokenspeed.weights.packed import PackedTensor, Weight
from tokenspeed.weights.staging import Lane, OpenFiles, Target

ALIGNMENT = 16
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


def plain_dtype(segment: PackedTensor) -> torch.dtype | None:
    """The type of its values where `data` holds just these, row after row; None where there is more to be done."""
    return None if segment.heads or segment.exchanged else _PLAIN.get(segment.fmt)


def line_bytes(segment: PackedTensor) -> int:
    """Bytes of what is never cut."""
    return segment.nbytes // segment.lines


@dataclass(frozen=True)
class Piece:
    """Lines [first, last) of a segment, of one matrix where matrices are exchanged. rows: all rows of the weight on the
    device, [rows, cols]; those of the segment begin at `start`."""

    segment: PackedTensor
    rows: torch.Tensor
    start: int
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * line_bytes(self.segment)

    @property
    def is_direct(self) -> bool:
        """Whether its bytes are those that the weight is to have."""
        return plain_dtype(self.segment) == self.rows.dtype

    def read(self, files: OpenFiles, into: memoryview) -> None:
        """Its bytes, from its file, or from where they are in memory."""
        start = self.first * line_bytes(self.segment)
        part = None if self.segment.mapped is None else file_part(self.segment.mapped)
        if part is None:
            data = self.segment.data.view(-1)[start : start + self.nbytes]
            torch.frombuffer(into, dtype=torch.uint8).copy_(data)
        else:
            owner, offset = part
            files.read(owner, offset + start, into)

    @property
    def place(self) -> int:
        """At which byte of the weight a direct piece begins."""
        return (self.start + self.first) * line_bytes(self.segment)

    def put(self, data: torch.Tensor) -> None:
        """Unpack its bytes, uint8 [nbytes] on the device, to where they belong."""
        segment, dtype = self.segment, self.rows.dtype
        rows = self.rows[self.start : self.start + segment.rows]
        lines = data.view(self.last - self.first, -1)
        if segment.exchanged:
            matrix, at = divmod(self.first, segment.cols)
            columns = lines.view(_PLAIN[segment.fmt]).to(dtype)
            each = columns.shape[1]
            places = segment.places(matrix * each, (matrix + 1) * each, data.device)
            rows[:, at : at + len(columns)].index_copy_(0, places, columns.T)
        elif segment.heads:
            places = segment.places(self.first, self.last, data.device)
            rows.index_copy_(0, places, unpack(lines, segment.fmt, segment.cols, dtype))
        else:
            unpack(lines, segment.fmt, segment.cols, dtype, rows[self.first : self.last])


@dataclass(frozen=True)
class Part:
    """What goes through a buffer at once: pieces of one weight that follow each other, all of them direct, or none."""

    pieces: list[Piece]

    @property
    def nbytes(self) -> int:
        """Packed bytes."""
        return sum(piece.nbytes for piece in self.pieces)

    def run(self, lane: Lane, files: OpenFiles, target: Target, after: torch.cuda.Event | None) -> None:
        """Read it and send it on its way, behind `after`. target: the weight's bytes."""
        first, spans = self.pieces[0], self._spans()

        def read(buffer: memoryview) -> int:
            for piece, (start, end) in zip(self.pieces, spans, strict=True):
                piece.read(files, buffer[start:end])
            return spans[-1][1]

        used = lane.fill(read)
        if first.is_direct:
            lane.send(used, target, first.place, after)
        else:
            lane.use(used, self._put, after)

    def _spans(self) -> list[tuple[int, int]]:
        """The bytes of the buffer that each piece has."""
        spans, end = [], 0
        for piece in self.pieces:
            start = _place(piece, end)
            end = start + piece.nbytes
            spans.append((start, end))
        return spans

    def _put(self, data: torch.Tensor) -> None:
        for piece, (start, end) in zip(self.pieces, self._spans(), strict=True):
            piece.put(data[start:end])


def _place(piece: Piece, end: int) -> int:
    """Where a piece begins behind others: values that are unpacked from there lie aligned."""
    return end if piece.is_direct else -(-end // ALIGNMENT) * ALIGNMENT


def parts_of(weight: Weight, rows: torch.Tensor, limit: int) -> Iterator[Part]:
    """All of a weight in parts of at most `limit` bytes, which no line may exceed. rows: its rows on the device."""
    gathered: list[Piece] = []
    end = 0
    for piece in _pieces(weight, rows, limit):
        after = _place(piece, end) + piece.nbytes
        if gathered and (after > limit or piece.is_direct != gathered[0].is_direct):
            yield Part(gathered)
            gathered, after = [], piece.nbytes
        gathered.append(piece)
        end = after
    if gathered:
        yield Part(gathered)


def _pieces(weight: Weight, rows: torch.Tensor, limit: int) -> Iterator[Piece]:
    start = 0
    for segment in weight.segments:
        each = segment.lines // (segment.exchanged or 1)
        step = min(each, max(1, limit // line_bytes(segment)))
        for matrix in range(0, segment.lines, each):
            for first in range(matrix, matrix + each, step):
                yield Piece(segment, rows, start, first, min(first + step, matrix + each))
        start += segment.rows
