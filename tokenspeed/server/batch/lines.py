"""Lines of a file or a pipe, one by one, each when it is asked for."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from tokenspeed.contracts.errors import ConfigError

CHUNK_BYTES = 2**16
Read = Callable[[int], bytes | None]
"""At most so many bytes; none at the end."""


class Line(NamedTuple):
    """number: from 1. raw: without its end. cut: it was longer, and the rest is dropped. ended: by a line end, not by
    the file's. end: bytes of the file up to here."""

    number: int
    raw: bytes
    cut: bool
    ended: bool
    end: int


def open_lines(path: str) -> Read:
    """A reader of a file, or of stdin for "-". Raises ConfigError where it cannot be opened."""
    if path == "-":
        # A thread that waits in sys.stdin itself would hold its lock when the process ends.
        return partial(os.read, sys.stdin.fileno())
    try:
        return open(path, "rb", buffering=0).read
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def split_lines(read: Read, most: int) -> Iterator[Line]:
    """Lines, of which `most` bytes at most are kept."""
    number, kept, size, end = 1, bytearray(), 0, 0
    while chunk := read(CHUNK_BYTES):
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            kept += part[: most - len(kept)]
            size += len(part)
            end += len(part) + 1
            yield Line(number, bytes(kept), size > most, True, end)
            number, size = number + 1, 0
            kept.clear()
        kept += rest[: most - len(kept)]
        size += len(rest)
        end += len(rest)
    if size:
        yield Line(number, bytes(kept), size > most, False, end)


class LineFeed:
    """Hands out lines to tasks of the running loop. A thread reads them, as a pipe may have none for a long time."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._loop = asyncio.get_running_loop()
        self._asks: queue.SimpleQueue[asyncio.Future[Line | None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="read-lines", daemon=True).start()

    async def next(self) -> Line | None:
        """The next line; None after the last. Raises ConfigError where the file cannot be read."""
        ask: asyncio.Future[Line | None] = self._loop.create_future()
        self._asks.put(ask)
        return await ask

    def _serve(self) -> None:
        while True:
            ask = self._asks.get()
            line, error = None, None
            try:
                line = next(self._lines, None)
            except OSError as problem:
                error = ConfigError(f"the input cannot be read ({problem.strerror})")
            with suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(_answer, ask, line, error)


def _answer(ask: asyncio.Future[Line | None], line: Line | None, error: Exception | None) -> None:
    if ask.done():
        return  # cancelled
    if error is not None:
        ask.set_exception(error)
    else:
        ask.set_result(line)
