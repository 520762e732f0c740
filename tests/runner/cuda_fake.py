"""CUDA's driver as `cuda.bindings.driver` shows it, over memory of this process.

It accounts for every range, handle and mapping, asserts that calls obey the documented rules, and can fail at chosen
calls."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch

from tokenspeed.runner.arena_memory import ArenaMemory
from tokenspeed.runner.gpu.driver import Driver
from tokenspeed.runner.gpu.memory import DeviceMemory, VirtualRange

POISON = 0xA5
"""What new memory holds, and what is left where memory was."""
VIRTUAL, DEVICE, PINNED, READ_WRITE = 102, 1, 1, 3


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_UNKNOWN = 999


class Properties(SimpleNamespace):
    def __init__(self) -> None:
        super().__init__(type=0, location=SimpleNamespace(type=0, id=-1))


@dataclass
class Physical:
    nbytes: int
    mapped: bool = False
    released: bool = False


@dataclass
class FakeCuda:
    """One device, number 3. fail_at: numbers of calls, from 1, that do nothing and return CUDA_ERROR_UNKNOWN."""

    total: int
    granularity: int = 4096
    others: int = 0
    fail_at: frozenset[int] = frozenset()
    virtual: bool = True
    calls: list[str] = field(default_factory=list)
    ranges: dict[int, int] = field(default_factory=dict)
    physical: list[Physical] = field(default_factory=list)
    mappings: dict[int, tuple[int, Physical]] = field(default_factory=dict)
    allowed: set[int] = field(default_factory=set)
    backing: list[mmap.mmap] = field(default_factory=list)

    CUresult = Result
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED=VIRTUAL)
    CUmemAllocationProp = Properties
    CUmemAccessDesc = SimpleNamespace
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=PINNED)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=DEVICE)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=READ_WRITE)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    @property
    def free(self) -> int:
        return self.total - self.others - sum(p.nbytes for p in self.physical if p.mapped or not p.released)

    def leaks(self) -> list[object]:
        """Ranges, handles and mappings that somebody still has."""
        held = [p for p in self.physical if p.mapped or not p.released]
        return [*self.ranges, *held, *self.mappings, *self.allowed]

    def fails(self, name: str) -> bool:
        self.calls.append(name)
        return len(self.calls) in self.fail_at

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Any, ...]:
        assert (attribute, device) == (VIRTUAL, 3)
        return (Result.CUDA_ERROR_UNKNOWN, 0) if self.fails("attribute") else (Result.CUDA_SUCCESS, int(self.virtual))

    def cuMemGetAllocationGranularity(self, properties: Properties, option: int) -> tuple[Any, ...]:
        self._check(properties)
        return (Result.CUDA_ERROR_UNKNOWN, 0) if self.fails("granularity") else (Result.CUDA_SUCCESS, self.granularity)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        if self.fails("info"):
            return Result.CUDA_ERROR_UNKNOWN, 0, 0
        return Result.CUDA_SUCCESS, self.free, self.total

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        return (Result.CUDA_ERROR_UNKNOWN,) if self.fails("wait") else (Result.CUDA_SUCCESS,)

    def cuMemAddressReserve(self, size: int, alignment: int, hint: int, flags: int) -> tuple[Any, ...]:
        assert (alignment, hint, flags) == (0, 0, 0)
        assert size > 0
        assert size % self.granularity == 0
        if self.fails("reserve"):
            return Result.CUDA_ERROR_UNKNOWN, 0
        self.backing.append(mmap.mmap(-1, size + self.granularity))  # kept, so that a stale read is no crash
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.backing[-1]))
        address = -(-start // self.granularity) * self.granularity
        self.ranges[address] = size
        return Result.CUDA_SUCCESS, address

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any, ...]:
        assert self.ranges.get(address) == size, "no such range, or freed before"
        assert not [at for at in self.mappings if address <= at < address + size], "freed while something is mapped"
        if self.fails("free"):
            return (Result.CUDA_ERROR_UNKNOWN,)
        del self.ranges[address]
        return (Result.CUDA_SUCCESS,)

    def cuMemCreate(self, size: int, properties: Properties, flags: int) -> tuple[Any, ...]:
        self._check(properties)
        assert flags == 0
        assert size > 0
        assert size % self.granularity == 0
        if self.fails("create"):
            return Result.CUDA_ERROR_UNKNOWN, None
        if size > self.free:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        self.physical.append(Physical(size))
        return Result.CUDA_SUCCESS, self.physical[-1]

    def cuMemRelease(self, handle: Physical) -> tuple[Any, ...]:
        assert not handle.released, "released twice"
        if self.fails("release"):
            return (Result.CUDA_ERROR_UNKNOWN,)
        handle.released = True
        return (Result.CUDA_SUCCESS,)

    def cuMemMap(self, address: int, size: int, offset: int, handle: Physical, flags: int) -> tuple[Any, ...]:
        assert (offset, flags) == (0, 0)
        assert not handle.released
        assert not handle.mapped
        assert size == handle.nbytes
        start, length = next((r, n) for r, n in self.ranges.items() if r <= address < r + n)
        assert (address - start) % self.granularity == 0
        assert address + size <= start + length
        assert not [at for at, (n, _) in self.mappings.items() if at < address + size and address < at + n], "overlap"
        if self.fails("map"):
            return (Result.CUDA_ERROR_UNKNOWN,)
        handle.mapped = True
        self.mappings[address] = size, handle
        ctypes.memset(address, POISON, size)
        return (Result.CUDA_SUCCESS,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any, ...]:
        assert self.mappings[address][0] == size, "unmapped in part"
        if self.fails("unmap"):
            return (Result.CUDA_ERROR_UNKNOWN,)
        self.mappings.pop(address)[1].mapped = False
        self.allowed.discard(address)
        ctypes.memset(address, POISON, size)
        return (Result.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[Any, ...]:
        assert count == len(access) == 1
        assert (access[0].location.type, access[0].location.id, access[0].flags) == (DEVICE, 3, READ_WRITE)
        inside = self._mapped_between(address, size)
        assert sum(self.mappings[at][0] for at in inside) == size, "access to what is not mapped"
        if self.fails("allow"):
            return (Result.CUDA_ERROR_UNKNOWN,)
        self.allowed |= set(inside)
        return (Result.CUDA_SUCCESS,)

    def touchable(self, address: int, nbytes: int) -> bool:
        """Whether the device may read and write all of it."""
        rounded = -(-nbytes // self.granularity) * self.granularity
        inside = self._mapped_between(address, rounded)
        return sum(self.mappings[at][0] for at in inside) >= nbytes and self.allowed >= set(inside)

    def _mapped_between(self, address: int, nbytes: int) -> list[int]:
        return [at for at in self.mappings if address <= at < address + nbytes]

    def _check(self, properties: Properties) -> None:
        assert (properties.type, properties.location.type, properties.location.id) == (PINNED, DEVICE, 3)


@dataclass
class FakeCard:
    """A `Card` whose device is the host: tensors lie over the fake's ranges."""

    cuda: FakeCuda
    chunk_bytes: int = 3 * 4096
    settled: int = 0

    def memory(self) -> tuple[int, int]:
        return self.cuda.free, self.cuda.total

    def settle(self) -> None:
        self.settled += 1

    def tensor(self, owner: VirtualRange, nbytes: int) -> torch.Tensor:
        assert self.cuda.touchable(owner.address, nbytes)
        held: Any = type("Held", (ctypes.c_uint8 * nbytes,), {})
        held = held.from_address(owner.address)
        held.owner = owner
        return torch.frombuffer(held, dtype=torch.uint8)

    def pages(self, nbytes: int) -> ArenaMemory:
        return DeviceMemory(Driver(self.cuda, 3), self, nbytes, self.chunk_bytes)
