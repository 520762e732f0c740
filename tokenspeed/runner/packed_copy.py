"""Packed weights kept on disk, so that the next load reads them as they will lie in memory.

A file is: MAGIC, a byte-order mark (u32), the header's length (u32), the header (msgpack), then each segment at a
multiple of ALIGN. A copy that does not match what this load would pack, or its own sums, is written anew.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from tokenspeed.config.paths import temporary_file
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.formats.checkpoint import Bytes, Checkpoint

logger = logging.getLogger("tokenspeed")
MAGIC = b"TSPACKED"
ALIGN = 4096
CHUNK = 8 << 20
"""Bytes that are read, and summed, at a time."""
_ORDER = 0x01020304
_START = struct.Struct("=8sII")
_MAX_HEADER = 64 << 20


class Place(msgspec.Struct, frozen=True):
    """A segment in the file, in bytes. sums: of each CHUNK as little 64-bit numbers, modulo 2^64."""

    offset: int
    nbytes: int
    sums: list[int]


class Header(msgspec.Struct, frozen=True):
    """What a copy was made from, and where its segments lie. sources: size and time of change of each file."""

    layout: int
    digest: str
    recipe: str
    sources: list[tuple[int, int]]
    places: list[Place]


@dataclass(frozen=True)
class PackedCopy:
    """The copy of one model in `folder`."""

    folder: Path
    digest: str
    sources: list[tuple[int, int]]

    @classmethod
    def of(cls, folder: str, digest: str, checkpoint: Checkpoint) -> PackedCopy:
        """Raises ConfigError for a folder that cannot be made."""
        path = Path(folder).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(path, error) from None
        status = [file.stat() for file in checkpoint.files]
        return cls(path, digest, [(each.st_size, each.st_mtime_ns) for each in status])

    def path(self, layout: int) -> Path:
        """Where the copy of a layout version lies."""
        return self.folder / f"{self.digest}-{layout}.packed"

    def read(self, layout: int, recipe: str, segments: Sequence[Bytes], done: Callable[[int], None]) -> bool:
        """Fill `segments` (uint8, writable) from the copy, calling `done` with bytes as they come.

        False where there is no copy, and, with one warning, where it does not fit: the segments may then hold anything.
        """
        path = self.path(layout)
        try:
            with path.open("rb") as file:
                places = self._checked_places(file.read(_START.size), file.fileno(), layout, recipe, segments)
                _read_all(file.fileno(), places, segments, done)
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            logger.warning("%s: %s; packing anew", path, error)
            return False
        return True

    def check_writable(self) -> None:
        """Raises ConfigError where nothing can be written to the folder."""
        try:
            with temporary_file(self.folder / "probe"):
                pass
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def write(self, layout: int, recipe: str, segments: Sequence[Bytes]) -> None:
        """Write the copy beside its name, then put it there at once. Raises ConfigError where that fails."""
        header = self._header(layout, recipe, segments)
        raw = msgspec.msgpack.encode(header)
        try:
            with temporary_file(self.path(layout)) as temporary:
                with temporary.open("wb", buffering=0) as file:
                    _write_at(file.fileno(), memoryview(_START.pack(MAGIC, _ORDER, len(raw)) + raw), 0)
                    for place, segment in zip(header.places, segments, strict=True):
                        _write_at(file.fileno(), memoryview(segment.data), _data_start(len(raw)) + place.offset)
                temporary.replace(self.path(layout))
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def _header(self, layout: int, recipe: str, segments: Sequence[Bytes]) -> Header:
        places = [
            Place(offset, nbytes, [_sum(segment[first:last]) for first, last in _chunks(nbytes)])
            for segment, (offset, nbytes, _) in zip(segments, _expected(segments), strict=True)
        ]
        return Header(layout, self.digest, recipe, self.sources, places)

    def _checked_places(
        self, start: bytes, file: int, layout: int, recipe: str, segments: Sequence[Bytes]
    ) -> list[Place]:
        if len(start) < _START.size:
            raise ValueError("it is truncated")
        magic, order, length = _START.unpack(start)
        if magic != MAGIC or order != _ORDER or length > _MAX_HEADER:
            raise ValueError("it is no packed copy of this machine's byte order")
        raw = os.pread(file, length, _START.size)
        try:
            header = msgspec.msgpack.decode(raw, type=Header)
        except msgspec.MsgspecError:
            raise ValueError("its header is broken") from None
        if (header.layout, header.digest, header.recipe) != (layout, self.digest, recipe):
            raise ValueError("it holds another model or layout")
        if header.sources != self.sources:
            raise ValueError("the model's files have changed since it was written")
        if [(each.offset, each.nbytes, len(each.sums)) for each in header.places] != _expected(segments):
            raise ValueError("its segments are not those of this model")
        return [Place(_data_start(length) + each.offset, each.nbytes, each.sums) for each in header.places]


def _expected(segments: Sequence[Bytes]) -> list[tuple[int, int, int]]:
    """Offset, bytes and number of chunks of each segment."""
    places, offset = [], 0
    for segment in segments:
        places.append((offset, segment.nbytes, len(list(_chunks(segment.nbytes)))))
        offset = _aligned(offset + segment.nbytes)
    return places


def _read_all(file: int, places: Sequence[Place], segments: Sequence[Bytes], done: Callable[[int], None]) -> None:
    tasks = [
        (segment[first:last], place.offset + first, wanted)
        for place, segment in zip(places, segments, strict=True)
        for (first, last), wanted in zip(_chunks(segment.nbytes), place.sums, strict=True)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for nbytes in pool.map(lambda task: _read_chunk(file, *task), tasks):
            done(nbytes)


def _read_chunk(file: int, target: Bytes, offset: int, wanted: int) -> int:
    got = 0
    while got < target.nbytes:
        count = os.preadv(file, [target[got:].data], offset + got)
        if count == 0:
            raise ValueError("it is truncated")
        got += count
    if _sum(target) != wanted:
        raise ValueError(f"its bytes from {offset} on are not those that were written")
    return got


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data[:CHUNK], offset)
        data, offset = data[count:], offset + count


def _chunks(nbytes: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + CHUNK, nbytes)) for first in range(0, nbytes, CHUNK))


def _sum(data: Bytes) -> int:
    whole = data.nbytes // 8 * 8
    return (int(np.add.reduce(data[:whole].view(np.uint64))) + int(data[whole:].sum())) % 2**64


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def _data_start(header: int) -> int:
    return _aligned(_START.size + header)


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--packed-cache {folder}: cannot be written ({error.strerror or error})")
