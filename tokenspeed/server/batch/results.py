"""Lines of OpenAI's batch output, and the file of them, which a later run goes on with.

Source: OpenAI's API reference, "The request output object" of Batch.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress

import msgspec

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.server.batch.lines import Line, split_lines
from tokenspeed.server.batch.requests import DUPLICATE

_ID = "batch_req_"
_BEGINNING = b'{"id":"' + _ID.encode()
_MOST = sys.maxsize


class BatchResponse(msgspec.Struct):
    """What a client would have got."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchError(msgspec.Struct):
    """What is wrong with the line itself."""

    code: str
    message: str


class BatchResult(msgspec.Struct):
    """A line of output. custom_id: None where the line of input has none that could be read. error: None where a
    request was made of the line, whatever its status."""

    id: str
    custom_id: str | None
    response: BatchResponse
    error: BatchError | None = None


class _KeptResponse(msgspec.Struct):
    status_code: int = 200


class _KeptError(msgspec.Struct):
    code: str | None = None


class _Kept(msgspec.Struct):
    """What has to be known of a result of an earlier run."""

    id: str
    custom_id: str | None
    response: _KeptResponse | None = None
    error: _KeptError | None = None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code >= 400 or self.error is not None


_kept = msgspec.json.Decoder(_Kept)


def key_of_custom_id(custom_id: str) -> bytes:
    """16 bytes that stand for it: millions of them are remembered."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16, person=b"custom_id").digest()


def key_of_line(line: Line) -> bytes:
    """The same for a line that has no custom_id of its own."""
    place = line.number.to_bytes(8)
    return hashlib.blake2b(place + line.raw, digest_size=16, person=b"line").digest()


def result(key: bytes, custom_id: str | None, status: int, body: bytes, error: BatchError | None = None) -> BatchResult:
    """A line of output, named after the line of input; body is JSON."""
    response = BatchResponse(status, f"req_{key.hex()}", msgspec.Raw(body))
    return BatchResult(_ID + key.hex(), custom_id, response, error)


class Results:
    """Where results go, each as a whole line. finished: keys of lines that have one already; num_failed: how many of
    those hold an error."""

    def __init__(self, write: Callable[[bytes], None], close: Callable[[], None] = lambda: None) -> None:
        self._write, self.close = write, close
        self.finished: set[bytes] = set()
        self.num_failed = 0
        self._failure: Exception | None = None

    def add(self, made: BatchResult) -> None:
        """Raises ConfigError where it cannot be written, BrokenPipeError where nobody reads it; from then on always: a
        line behind a part of another one would be lost with it."""
        if self._failure is None:
            try:
                self._write(msgspec.json.encode(made) + b"\n")
            except Exception as error:
                self._failure = error
        if self._failure is not None:
            raise self._failure

    def take_in(self, line: Line, path: str) -> None:
        """Count a line of an earlier run as finished. Raises ConfigError for what is none."""
        try:
            kept = _kept.decode(line.raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise _foreign(path, line) from None
        self.num_failed += kept.failed
        if kept.custom_id is not None and not (kept.error and kept.error.code == DUPLICATE):
            self.finished.add(key_of_custom_id(kept.custom_id))
        else:
            with suppress(ValueError):
                self.finished.add(bytes.fromhex(kept.id.removeprefix(_ID)))


def open_results(path: str) -> Results:
    """A file to go on with, or stdout for "-". A last line without an end is dropped from the file.

    Raises ConfigError where it cannot be written, where another run writes it, and where it holds anything but results.
    """
    if path == "-":
        return Results(_write_out)
    try:
        file = io.FileIO(path, "a+")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    results = Results(lambda line: _write_all(file, line, path), file.close)
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{path}: another run writes it") from None
        _go_on(file, results, path)
    return results


def _go_on(file: io.FileIO, results: Results, path: str) -> None:
    file.seek(0)
    for line in split_lines(file.read, _MOST):
        if line.ended:
            results.take_in(line, path)
        elif line.raw.startswith(_BEGINNING) or _BEGINNING.startswith(line.raw):
            file.truncate(line.end - len(line.raw))
        else:
            raise _foreign(path, line)


def _foreign(path: str, line: Line) -> ConfigError:
    return ConfigError(f"{path}: line {line.number} is no result of a batch: choose another output file")


def _write_all(file: io.FileIO, line: bytes, path: str) -> None:
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def _write_out(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
