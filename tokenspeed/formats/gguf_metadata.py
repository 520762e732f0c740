"""The key-value part of a GGUF file: a bounds-checked cursor, and a mapping that decodes arrays on first access.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little endian, versions 2 and 3).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.formats.checkpoint import Bytes

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_MIN_STRING = 8
_MIN_PAIR = 8 + 4 + 1
_SCAN_BYTES = 1 << 17
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """Reads little-endian values front to back; running past the end is a FormatError that names the item."""

    def __init__(self, path: Path, file: Bytes, pos: int = 0) -> None:
        self.path = path
        self.file = file
        self.pos = pos
        self._view = memoryview(file.data)

    @property
    def left(self) -> int:
        return len(self._view) - self.pos

    def skip(self, nbytes: int, what: str) -> int:
        """Step over `nbytes`; returns where they start."""
        start = self.pos
        if nbytes > self.left:
            raise self.error(f"truncated: {what} needs {nbytes} bytes at offset {start}, {self.left} are left")
        self.pos += nbytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self._view, self.skip(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self._view, self.skip(8, what))[0])

    def count(self, what: str, item_bytes: int) -> int:
        """A number of items of at least `item_bytes` each, that the rest of the file can hold."""
        count = self.u64(what)
        if count * item_bytes > self.left:
            raise self.error(f"{what} {count} is more than the {self.left} bytes left can hold")
        return count

    def string(self, what: str) -> str:
        size = self.u64(f"length of {what}")
        start = self.skip(size, what)
        return self.decode(self._view[start : start + size], what)

    def decode(self, raw: memoryview | bytes, what: str) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None

    def error(self, message: str) -> FormatError:
        return FormatError(f"{self.path}: {message}")


@dataclass(frozen=True)
class _ScalarArray:
    dtype: np.dtype[Any]
    start: int
    count: int

    def decode(self, cursor: Cursor, key: str) -> list[Any]:
        values: list[Any] = np.frombuffer(cursor.file, self.dtype, self.count, self.start).tolist()
        return values


@dataclass(frozen=True)
class _StringArray:
    starts: npt.NDArray[np.int64]
    """[count + 1] offsets of the length fields; the last is where the array ends."""

    def decode(self, cursor: Cursor, key: str) -> list[str]:
        first, end = int(self.starts[0]), int(self.starts[-1])
        try:
            return _split_strings(cursor.file[first:end].copy(), self.starts[:-1] - first)
        except UnicodeDecodeError:
            raise cursor.error(f"a string of metadata key {key!r} is not UTF-8") from None


def _split_strings(raw: Bytes, starts: npt.NDArray[np.int64]) -> list[str]:
    """Decode all strings at once: their length fields shrink to one NUL each, which then separates them."""
    raw[starts] = 0
    keep = np.ones(raw.size, dtype=np.bool_)
    for byte in range(1, 8):
        keep[starts + byte] = False
    strings = raw[keep].tobytes().decode().split("\0")[1:]
    if len(strings) == starts.size:
        return strings
    return [raw[start + 8 : end].tobytes().decode() for start, end in pairwise([*starts.tolist(), raw.size])]


class Metadata(Mapping[str, Any]):
    """Keys in file order. Scalars are Python values; arrays are lists, decoded when first read."""

    def __init__(self, cursor: Cursor, values: dict[str, Any]) -> None:
        self._cursor = cursor
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, (_ScalarArray, _StringArray)):
            value = self._values[key] = value.decode(self._cursor, key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def read_metadata(cursor: Cursor, count: int) -> Metadata:
    """Read `count` key-value pairs at the cursor. Raises FormatError on any that is malformed or comes twice."""
    if count * _MIN_PAIR > cursor.left:
        raise cursor.error(f"metadata count {count} is more than the {cursor.left} bytes left can hold")
    values: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"metadata key {index}")
        if not key or key in values:
            raise cursor.error(f"metadata key {key!r} {'comes twice' if key else 'is empty'}")
        values[key] = _read_value(cursor, key)
    return Metadata(cursor, values)


def _read_value(cursor: Cursor, key: str) -> Any:
    what = f"metadata key {key!r}"
    kind = cursor.u32(f"type of {what}")
    if kind == _STRING:
        return cursor.string(what)
    if kind == _ARRAY:
        return _read_array(cursor, what)
    return _ScalarArray(*_scalars(cursor, kind, 1, what)).decode(cursor, key)[0]


def _scalars(cursor: Cursor, kind: int, count: int, what: str) -> tuple[np.dtype[Any], int, int]:
    dtype = _SCALARS.get(kind)
    if dtype is None:
        raise cursor.error(f"{what} has the unknown value type {kind}")
    return dtype, cursor.skip(dtype.itemsize * count, what), count


def _read_array(cursor: Cursor, what: str) -> _ScalarArray | _StringArray:
    kind = cursor.u32(f"item type of {what}")
    if kind == _ARRAY:
        raise UnsupportedError(f"{cursor.path}: {what} is an array of arrays, which is not supported")
    if kind == _STRING:
        starts = string_starts(cursor, cursor.count(f"array length of {what}", _MIN_STRING), what)
        return _StringArray(starts)
    return _ScalarArray(*_scalars(cursor, kind, cursor.count(f"array length of {what}", 1), what))


def string_starts(cursor: Cursor, count: int, what: str) -> npt.NDArray[np.int64]:
    """Step over `count` length-prefixed strings; int64 [count + 1] offsets of their length fields and of the end.

    A vocabulary has some 10^5 strings: reading lengths one by one takes tens of ms. So numpy finds and checks whole
    runs, and single steps are taken only where a run breaks (twice as many each time, which bounds the rescans).
    """
    starts = np.empty(count + 1, dtype=np.int64)
    done, steps = 0, 1
    while done < count:
        run = _run_of_short_strings(cursor.file, cursor.pos)[: count - done]
        if run.size:
            starts[done : done + run.size] = run
            done += run.size
            cursor.pos = int(run[-1])
            cursor.skip(cursor.u64(what), what)
        if run.size < 64:
            for index in range(done, min(done + steps, count)):
                starts[index] = cursor.pos
                cursor.skip(cursor.u64(what), what)
            done = min(done + steps, count)
            steps *= 2
    starts[count] = cursor.pos
    return starts


def _run_of_short_strings(file: Bytes, pos: int) -> npt.NDArray[np.int64]:
    """Offsets of consecutive length fields from `pos` on, as far as they are certain within one window.

    A string under 256 bytes has seven zero bytes in its length field. Such places are candidates; the run ends before
    the first whose length does not lead exactly to the next candidate, so text that looks like a length cannot mislead.
    """
    window = file[pos : pos + _SCAN_BYTES]
    zero = window[1:] == 0
    two = zero[:-1] & zero[1:]
    four = two[:-2] & two[2:]
    candidates = np.flatnonzero(four[:-3] & four[3:])
    if candidates.size < 2 or candidates[0] != 0:
        return np.empty(0, dtype=np.int64)
    leads = candidates[:-1] + _MIN_STRING + window[candidates[:-1]] == candidates[1:]
    length = leads.size if leads.all() else int(np.argmin(leads))
    run: npt.NDArray[np.int64] = candidates[:length] + pos
    return run
