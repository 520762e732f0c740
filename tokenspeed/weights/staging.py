"""Where readers work while weights go to a device: bounded host buffers with a stream each, and open files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokenspeed.contracts.errors import FormatError
from tokenspeed.formats.checkpoint import FileMap, open_mapped


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


class Lane:
    """Of one reader's thread: two host buffers in turn, so that one is read into while the other is copied, and a
    stream. Host buffers are pinned where the device is a GPU."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.on_gpu = device.type == "cuda"
        self.times = Times()
        self._device, self._nbytes = device, nbytes
        self._hosts = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.on_gpu) for _ in range(2)]
        self._views = [host.numpy().data for host in self._hosts]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self._after: torch.cuda.Event | None = None
        self._room: torch.Tensor | None = None
        self._turn = 0

    def enter(self) -> None:
        """To be called by the thread, before anything else: its device work goes to the lane's stream from now on."""
        if self.stream is not None:
            torch.cuda.set_stream(self.stream)

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

    def send(
        self, nbytes: int, to: torch.Tensor | None, use: Callable[[torch.Tensor], None], after: torch.cuda.Event | None
    ) -> None:
        """Copy the start of that buffer to `to`, uint8 [nbytes] on the device, or where that is None to room of the
        lane's own, which `use` is then called with. All of it on the lane's stream, behind `after`."""
        started = time.perf_counter()
        host = self._hosts[self._turn][:nbytes]
        if self.stream is None:
            _deliver(host, to, use, host)
        else:
            if after is not None and after is not self._after:
                self.stream.wait_event(after)
                self._after = after
            if to is None and self._room is None:
                self._room = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
            _deliver(host, to, use, self._room)
            copied = self._copied[self._turn] = self._copied[self._turn] or torch.cuda.Event()
            copied.record(self.stream)
        self.times.sending += time.perf_counter() - started

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        if self.stream is not None:
            self.stream.synchronize()


def _deliver(
    host: torch.Tensor, to: torch.Tensor | None, use: Callable[[torch.Tensor], None], room: torch.Tensor | None
) -> None:
    if to is not None:
        to.copy_(host, non_blocking=True)
    elif room is not None:
        here = room[: len(host)]
        if here.data_ptr() != host.data_ptr():
            here.copy_(host, non_blocking=True)
        use(here)


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
