"""From weights as their file has them to packed segments of the C++ walk: in bounded memory, or from a copy on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch

from tokenspeed.kernels.cpu.registration import FORMATS, PLANES
from tokenspeed.runner.model import Progress
from tokenspeed.runner.packed_copy import PackedCopy
from tokenspeed.weights.packed import PackedTensor, Weight

CHUNK_BYTES = 8 << 20
"""Of the file that are packed at a time: so much of its map is in memory beside the packed weights."""
TILE_ROWS = 16


@dataclass(frozen=True)
class Handles:
    """What the walk calls each weight. experts: a matrix for each of a weight's experts."""

    matrices: dict[str, int]
    vectors: dict[str, int]
    experts: dict[str, list[int]]


@dataclass(frozen=True)
class _Segment:
    """Rows [first, last) of a weight's segment, which are one segment of a matrix of the walk."""

    matrix: int
    index: int
    rows: PackedTensor
    first: int
    last: int


def pack_weights(
    native: Any,
    weights: Mapping[str, Weight],
    planes: AbstractSet[str],
    copy: PackedCopy | None,
    layout: int,
    progress: Progress | None,
) -> Handles:
    """Put every weight into the walk `native`: from the copy where it is good, else packed, and written to the copy.

    planes: names of Q8_0 weights to keep in two planes. layout: version of the packed layout. Raises ConfigError for a
    copy that is to be written and cannot be.
    """
    handles, segments = _reserve(native, weights, planes)
    report = _Report(sum(weight.nbytes for weight in weights.values()), progress)
    if copy is None:
        _pack_all(native, segments, report)
        return handles
    recipe = _recipe(weights, planes)
    places = [native.packed(segment.matrix, segment.index) for segment in segments]
    if copy.read(layout, recipe, places, report.add):
        report.finish()
        return handles
    copy.check_writable()
    report.restart()
    _pack_all(native, segments, report)
    copy.write(layout, recipe, places)
    return handles


def _reserve(native: Any, weights: Mapping[str, Weight], planes: AbstractSet[str]) -> tuple[Handles, list[_Segment]]:
    handles, segments = Handles({}, {}, {}), []
    for name, weight in weights.items():
        if weight.spec.kind == "vector":
            handles.vectors[name] = native.add_vector(weight.unpacked(torch.float32).flatten().numpy())
            continue
        count = weight.shape[0] if weight.spec.kind == "experts" else 1
        matrices = [native.add_matrix(weight.spec.cols) for _ in range(count)]
        if weight.spec.kind == "experts":
            handles.experts[name] = matrices
        else:
            handles.matrices[name] = matrices[0]
        for number, rows, first, last in _cut(weight, weight.spec.rows // count):
            fmt = PLANES if name in planes else FORMATS.index(rows.fmt)
            index = native.reserve_segment(matrices[number], fmt, last - first)
            segments.append(_Segment(matrices[number], index, rows, first, last))
    return handles, segments


def _cut(weight: Weight, size: int) -> Iterator[tuple[int, PackedTensor, int, int]]:
    """The segments cut where matrices of `size` rows end: number of the matrix, segment, its rows [first, last)."""
    done = 0
    for rows in weight.segments:
        first = 0
        while first < rows.rows:
            last = min(rows.rows, first + size - done % size)
            yield done // size, rows, first, last
            done += last - first
            first = last


def _pack_all(native: Any, segments: list[_Segment], report: _Report) -> None:
    for segment in segments:
        rows = segment.rows
        step = max(TILE_ROWS, CHUNK_BYTES * rows.rows // rows.nbytes // TILE_ROWS * TILE_ROWS)
        for first in range(segment.first, segment.last, step):
            last = min(first + step, segment.last)
            native.pack_rows(segment.matrix, segment.index, first - segment.first, rows.rows_at(first, last).numpy())
            rows.drop_pages(first, last)
            report.add((last - first) * rows.nbytes // rows.rows)
    report.finish()


def _recipe(weights: Mapping[str, Weight], planes: AbstractSet[str]) -> str:
    """What is packed in which order: changes with the model's definition, whatever its files say."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{sorted(planes)}\n".encode())
    for weight in weights.values():
        parts = [(rows.fmt, rows.rows, rows.cols, rows.heads) for rows in weight.segments]
        digest.update(f"{weight.spec} {parts}\n".encode())
    return digest.hexdigest()


class _Report:
    """Bytes done, to whoever wants to know."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._done, self._progress = total, 0, progress

    def add(self, nbytes: int) -> None:
        self._done = min(self._total, self._done + nbytes)
        self._tell()

    def restart(self) -> None:
        self._done = 0

    def finish(self) -> None:
        self._done = self._total
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)
