"""KV memory on a GPU as a reserved range of addresses: mapped in chunks, unmapped to sleep, mapped there again to wake.

What refers to an address, a captured graph above all, stays valid through that.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tokenspeed.contracts.errors import DeviceError, TokenSpeedError
from tokenspeed.runner.gpu.driver import Driver

CHUNK_BYTES = 64 * 2**20
"""Of physical memory, most that is created at once: 80 GB are some thousand calls, and little is lost at the end."""


@dataclass
class _Chunk:
    address: int
    nbytes: int
    handle: Any
    mapped: bool = False


class VirtualRange:
    """Addresses reserved for good, of which the first `mapped` bytes have memory. Frees itself with the last
    reference."""

    def __init__(self, driver: Driver, nbytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Reserve at least `nbytes`. Raises what the driver does."""
        self._driver = driver
        self._chunks: list[_Chunk] = []
        self._usable = 0
        self._chunk_bytes = self._rounded(chunk_bytes)
        self.address, self.nbytes = 0, self._rounded(nbytes)
        self.address = driver.reserve(self.nbytes)

    @property
    def mapped(self) -> int:
        """Bytes from the start that have memory and may be touched; a multiple of the granularity."""
        return sum(chunk.nbytes for chunk in self._chunks[: self._usable])

    def map(self, nbytes: int) -> None:
        """Let at least the first `nbytes` have memory. All or nothing: a failure changes nothing. Raises what the
        driver does."""
        if not self.address or nbytes > self.nbytes:
            raise RuntimeError(f"{nbytes} bytes to map in a range of {self.nbytes if self.address else 0}")
        self._drop_to(self._usable)  # what an earlier failure may have left
        start, end = self.mapped, self._rounded(nbytes)
        if end <= start:
            return
        try:
            for at in range(start, end, self._chunk_bytes):
                self._add(self.address + at, min(self._chunk_bytes, end - at))
            self._driver.allow(self.address + start, end - start)
        except BaseException:
            with suppress(TokenSpeedError):
                self._drop_to(self._usable)
            raise
        self._usable = len(self._chunks)

    def unmap(self) -> None:
        """Wait for the device, then give all memory back; the addresses stay reserved. May be called again, also after
        it failed."""
        if self._chunks:
            self._driver.wait()
        self._drop_to(0)

    def close(self) -> None:
        """Give memory and addresses back. May be called again, also after it failed."""
        self.unmap()
        if self.address:
            self._driver.free(self.address, self.nbytes)
            self.address = 0

    def _add(self, address: int, nbytes: int) -> None:
        chunk = _Chunk(address, nbytes, self._driver.create(nbytes))
        self._chunks.append(chunk)
        self._driver.map(address, nbytes, chunk.handle)
        chunk.mapped = True

    def _drop_to(self, count: int) -> None:
        """From the last on, so that what is left lies at the start. Each step is noted before the next is tried."""
        while len(self._chunks) > count:
            chunk = self._chunks[-1]
            self._usable = min(self._usable, len(self._chunks) - 1)
            if chunk.mapped:
                self._driver.unmap(chunk.address, chunk.nbytes)
                chunk.mapped = False
            self._driver.release(chunk.handle, chunk.nbytes)
            self._chunks.pop()

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self._driver.granularity) * self._driver.granularity

    def __del__(self) -> None:
        # The device may be gone when the interpreter ends.
        with suppress(Exception):
            self.close()


class Surroundings(Protocol):
    """What mapped memory needs of torch."""

    def settle(self) -> None:
        """Wait for all work of the device, then give back what torch keeps for later."""
        ...

    def tensor(self, owner: VirtualRange, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] over the start of the range, without a copy; keeps the range alive."""
        ...


class DeviceMemory:
    """An `ArenaMemory` over a virtual range."""

    def __init__(self, driver: Driver, surroundings: Surroundings, nbytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Reserve and map `nbytes`. Raises what the driver does; nothing is taken then."""
        self._surroundings, self._nbytes = surroundings, nbytes
        self._range = VirtualRange(driver, nbytes, chunk_bytes)
        try:
            self._range.map(nbytes)
            self.data = surroundings.tensor(self._range, nbytes)
        except BaseException:
            with suppress(TokenSpeedError):
                self._range.close()
            raise

    def sleep(self) -> None:
        self._surroundings.settle()
        self._range.unmap()

    def wake(self) -> None:
        self._surroundings.settle()
        self._range.map(self._nbytes)

    def close(self) -> None:
        self._surroundings.settle()
        self._range.close()


class CudaArray:
    """Tells torch where memory lies: the CUDA array interface, version 2.
    https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""

    def __init__(self, owner: VirtualRange, nbytes: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (owner.address, False),
            "strides": None,
            "version": 2,
        }


def tensor_of(owner: VirtualRange, nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [nbytes] on a CUDA device over the start of a range; the tensor keeps the range alive. Raises DeviceError
    where torch would not take the memory as it is."""
    tensor = torch.as_tensor(CudaArray(owner, nbytes), device=device)
    if tensor.data_ptr() != owner.address:
        raise DeviceError(f"torch copied the {nbytes} bytes at {owner.address:#x} that it was to use in place")
    return tensor
