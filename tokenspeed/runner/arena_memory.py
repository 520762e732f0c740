"""Where the bytes of an arena come from. Their address stays while the memory sleeps and after it woke."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Protocol

import torch

from tokenspeed.contracts.errors import MemoryLimitError, UnsupportedError


class ArenaMemory(Protocol):
    """One run of bytes at one address."""

    @property
    def data(self) -> torch.Tensor:
        """uint8 [bytes]; touched only while awake."""
        ...

    def sleep(self) -> None:
        """Give the memory back; what it held is lost. Nothing to do where it is asleep. Raises DeviceError, after which
        it may be tried again, and UnsupportedError where there is no way."""
        ...

    def wake(self) -> None:
        """Take memory again, with any content. Nothing to do where it is awake. Raises MemoryLimitError and
        DeviceError, and is asleep then."""
        ...

    def close(self) -> None:
        """Give everything back for good. May be called again."""
        ...


class HostMemory:
    """Anonymous memory of this process: pages cost nothing before they are touched, and sleeping makes them all
    untouched. Of 2 MiB where the system has such: attention reads all over them, and looking up addresses would hold up
    its prefetch."""

    def __init__(self, nbytes: int) -> None:
        """Raises MemoryLimitError where the system grants no such range."""
        try:
            self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryLimitError(f"{nbytes} bytes for the KV cache: {error.strerror}") from None
        with suppress(OSError, AttributeError):  # a system without such pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)

    def sleep(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)

    def wake(self) -> None:
        """Nothing to do: pages come as they are touched."""

    def close(self) -> None:
        """The range itself goes with the tensors over it."""
        self.sleep()


class TorchMemory:
    """Memory of torch's allocator, which cannot sleep. why_awake: the reason, for people."""

    def __init__(self, nbytes: int, device: torch.device, why_awake: str) -> None:
        """Raises MemoryLimitError where the device has too little."""
        try:
            self.data = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise MemoryLimitError(f"{nbytes} bytes for the KV cache on {device}: {error}") from None
        self._why = why_awake

    def sleep(self) -> None:
        raise UnsupportedError(f"the KV cache cannot sleep: {self._why}")

    def wake(self) -> None:
        """Nothing to do: it never slept."""

    def close(self) -> None:
        """Memory goes with the tensors over it."""
