"""Where readers work while weights go to a device: bounded host buffers with a stream each, and open files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

from tokenspeed.contracts.errors import FormatError
from tokenspeed.formats.checkpoint import FileMap, open_mapped


class Lane:
    """For one reader at a time: two host buffers in turn, so that one is read into while the other is copied, and a
    stream. Host buffers are pinned where the device is a GPU."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        on_gpu = device.type == "cuda"
        self._device, self._nbytes = device, nbytes
        self._hosts = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._views = [host.numpy().data for host in self._hosts]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._room: torch.Tensor | None = None
        self._turn = 0

    def buffer(self) -> memoryview:
        """The buffer whose turn it is, once nothing is copied from it any more."""
        self._turn = 1 - self._turn
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._views[self._turn]

    def send(
        self, nbytes: int, to: torch.Tensor | None, use: Callable[[torch.Tensor], None], after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """Copy the start of that buffer to `to`, uint8 [nbytes] on the device, or where that is None to room of the
        lane's own, which `use` is then called with. All of it on the lane's stream, behind `after`; the event of its
        end."""
        host = self._hosts[self._turn][:nbytes]
        if self._stream is None:
            _deliver(host, to, use, host)
            return None
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            if to is None and self._room is None:
                self._room = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
            _deliver(host, to, use, self._room)
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._stream)
        self._copied[self._turn] = copied
        return copied

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        if self._stream is not None:
            self._stream.synchronize()


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
        with self._lock:
            if owner not in self._descriptors:
                self._descriptors[owner] = open_mapped(owner)
            descriptor = self._descriptors[owner]
        done = 0
        while done < len(into):
            count = os.preadv(descriptor, [into[done:]], offset + done)
            if count == 0:
                raise FormatError(f"{owner.path}: ends at byte {offset + done} while it was read")
            done += count

    def close(self) -> None:
        """Give them back."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
