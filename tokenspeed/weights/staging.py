"""Where readers work while weights go to a device: bounded host buffers with a stream each, and open files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokenspeed.contracts.errors import FormatError
from tokenspeed.formats.checkpoint import FileMap, open_mapped
from tokenspeed.weights.driver_calls import DriverCalls


@dataclass
class Times:
    """Seconds that readers spent, all together: waiting for copies from their buffers, reading, and asking for
    copies."""

    waiting: float = 0.0
    reading: float = 0.0
    sending: float = 0.0

    def add(self, other: Times) -> None:
        """Add another's."""
        self.waiting += other.waiting
        self.reading += other.reading
        self.sending += other.sending


class Target(NamedTuple):
    """Where the bytes of a weight belong: uint8 [nbytes] on the device, and the address of its first."""

    data: torch.Tensor
    address: int


class Lane:
    """Of one reader's thread: two host buffers in turn, so that one is read into while the other is copied, and a
    stream. Host buffers are pinned where the device is a GPU.

    What is done for every part is kept short: its threads share the interpreter's lock.
    """

    def __init__(self, device: torch.device, nbytes: int, calls: DriverCalls | None = None) -> None:
        """calls: of a CUDA device's driver; without them torch's are taken."""
        self.times = Times()
        self.last: torch.cuda.Event | None = None
        """Behind all copies so far."""
        self._device, self._nbytes, self._calls = device, nbytes, calls
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._handle = 0 if self._stream is None else self._stream.cuda_stream
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._after: torch.cuda.Event | None = None
        self._room: torch.Tensor | None = None
        self._turn = 0

    def enter(self) -> None:
        """To be called by the thread, before anything else: makes the buffers, and its device work goes to the lane's
        stream from now on."""
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)
        if self._calls is not None:
            self._calls.enter()
        pinned = self._stream is not None
        self._hosts = [torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._addresses = [host.data_ptr() for host in self._hosts]
        self._views = [host.numpy().data for host in self._hosts]

    def fill(self, read: Callable[[memoryview], int]) -> int:
        """Let `read` fill the buffer whose turn it is, once nothing is copied from it any more; bytes that it used."""
        started = time.perf_counter()
        self._turn = 1 - self._turn
        copied = self._copied[self._turn]
        if copied is not None and not copied.query():
            copied.synchronize()
        free = time.perf_counter()
        used = read(self._views[self._turn])
        self.times.waiting += free - started
        self.times.reading += time.perf_counter() - free
        return used

    def send(self, nbytes: int, target: Target, at: int, after: torch.cuda.Event | None) -> None:
        """Copy the start of that buffer to the target's bytes from `at` on, on the lane's stream, behind `after`."""
        started = time.perf_counter()
        self._wait(after)
        if self._calls is not None:
            self._calls.copy(target.address + at, self._addresses[self._turn], nbytes, self._handle)
        else:
            _copy(self._hosts[self._turn][:nbytes], target.data[at : at + nbytes])
        self._mark()
        self.times.sending += time.perf_counter() - started

    def use(self, nbytes: int, work: Callable[[torch.Tensor], None], after: torch.cuda.Event | None) -> None:
        """Copy the start of that buffer to room of the lane's own on the device, and call `work` with it, uint8
        [nbytes]; on the lane's stream, behind `after`."""
        started = time.perf_counter()
        self._wait(after)
        host = self._hosts[self._turn][:nbytes]
        if self._stream is not None:
            if self._room is None:
                self._room = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
            _copy(host, self._room[:nbytes])
            host = self._room[:nbytes]
        work(host)
        self._mark()
        self.times.sending += time.perf_counter() - started

    def _wait(self, after: torch.cuda.Event | None) -> None:
        if after is None or after is self._after or self._stream is None:
            return
        if self._calls is not None:
            self._calls.wait(self._handle, after.cuda_event)
        else:
            self._stream.wait_event(after)
        self._after = after

    def _mark(self) -> None:
        if self._stream is not None:
            copied = self._copied[self._turn] or torch.cuda.Event()
            copied.record(self._stream)
            self._copied[self._turn] = self.last = copied

    def follow(self, stream: torch.cuda.Stream) -> None:
        """Let a stream wait for all copies so far."""
        if self.last is None:
            return
        if self._calls is not None:
            self._calls.wait(stream.cuda_stream, self.last.cuda_event)
        else:
            stream.wait_event(self.last)

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        if self._stream is not None:
            self._stream.synchronize()


def _copy(host: torch.Tensor, to: torch.Tensor) -> None:
    to.copy_(host, non_blocking=True)


class OpenFiles:
    """Descriptors of mapped files, each opened once for all readers."""

    def __init__(self) -> None:
        self._descriptors: dict[FileMap, int] = {}
        self._lock = threading.Lock()

    def read(self, owner: FileMap, offset: int, into: memoryview) -> None:
        """Fill `into` from byte `offset` on, past the map, so that no page of it comes into this process. Raises
        FormatError where the file has changed or ends before."""
        descriptor = self._descriptors.get(owner)
        if descriptor is None:
            descriptor = self._open(owner)
        done = 0
        while done < len(into):
            count = os.preadv(descriptor, [into[done:]], offset + done)
            if count == 0:
                raise FormatError(f"{owner.path}: ends at byte {offset + done} while it was read")
            done += count

    def _open(self, owner: FileMap) -> int:
        with self._lock:
            if owner not in self._descriptors:
                self._descriptors[owner] = open_mapped(owner)
            return self._descriptors[owner]

    def close(self) -> None:
        """Give them back."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
