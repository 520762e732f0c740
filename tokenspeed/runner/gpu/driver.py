"""The calls of CUDA's driver that manage virtual memory, with errors that name the call, its bytes and what is free.

CUDA driver API, "Virtual Memory Management": an address range is reserved, physical memory is created and mapped into
it, and access is granted to the mapped part.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from tokenspeed.contracts.errors import DeviceError, MemoryLimitError, TokenSpeedError, UnsupportedError


class Driver:
    """One device. Some context of it is current in the calling thread. Every call raises MemoryLimitError where memory
    is short, and DeviceError otherwise."""

    def __init__(self, api: Any, device: int) -> None:
        """api: `cuda.bindings.driver`. device: its ordinal. Raises UnsupportedError where the device has no virtual
        memory management."""
        self._api = api
        attribute = api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self._call(api.cuDeviceGetAttribute, 0, attribute, device):
            raise UnsupportedError(f"CUDA device {device} has no virtual memory management")
        self._properties = api.CUmemAllocationProp()
        self._properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device
        self._access = api.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        option = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(self._call(api.cuMemGetAllocationGranularity, 0, self._properties, option))
        """Bytes of which every address and size here is a multiple."""

    def reserve(self, nbytes: int) -> int:
        """The address of a new range, without memory."""
        return int(self._call(self._api.cuMemAddressReserve, nbytes, nbytes, 0, 0, 0))

    def free(self, address: int, nbytes: int) -> None:
        """Give a whole range back, to which nothing is mapped."""
        self._call(self._api.cuMemAddressFree, nbytes, address, nbytes)

    def create(self, nbytes: int) -> Any:
        """A handle of physical memory, without an address."""
        return self._call(self._api.cuMemCreate, nbytes, nbytes, self._properties, 0)

    def release(self, handle: Any, nbytes: int) -> None:
        """Give up a handle; its memory is free when it is mapped nowhere."""
        self._call(self._api.cuMemRelease, nbytes, handle)

    def map(self, address: int, nbytes: int, handle: Any) -> None:
        """Let the address mean the handle's memory. It may not be touched before `allow`."""
        self._call(self._api.cuMemMap, nbytes, address, nbytes, 0, handle, 0)

    def unmap(self, address: int, nbytes: int) -> None:
        """Undo one `map`. Nothing may be running that touches it."""
        self._call(self._api.cuMemUnmap, nbytes, address, nbytes)

    def allow(self, address: int, nbytes: int) -> None:
        """Let the device read and write mapped memory."""
        self._call(self._api.cuMemSetAccess, nbytes, address, nbytes, [self._access], 1)

    def wait(self) -> None:
        """Wait for all work of the context."""
        self._call(self._api.cuCtxSynchronize, 0)

    def memory(self) -> tuple[int, int]:
        """Bytes free, and in all."""
        free, total = self._call(self._api.cuMemGetInfo, 0)
        return int(free), int(total)

    def _call(self, function: Callable[..., Any], nbytes: int, *arguments: Any) -> Any:
        status, *found = function(*arguments)
        if status != self._api.CUresult.CUDA_SUCCESS:
            raise self._error(function.__name__, nbytes, status)
        return found[0] if len(found) == 1 else found

    def _error(self, call: str, nbytes: int, status: Any) -> TokenSpeedError:
        asked = f"{call} of {nbytes} bytes" if nbytes else call
        text = f"{asked} failed with {status.name}{self._limits() if nbytes else ''}"
        if status == self._api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            return MemoryLimitError(f"{text}: lower --gpu-memory-utilization, or end what else uses the device")
        return DeviceError(text)

    def _limits(self) -> str:
        status, *memory = self._api.cuMemGetInfo()
        if status != self._api.CUresult.CUDA_SUCCESS:
            return ""
        return f" ({int(memory[0])} of the device's {int(memory[1])} bytes are free)"


def load_driver(device: int) -> Driver:
    """The driver through cuda-bindings, an optional package. Raises UnsupportedError where it cannot be used."""
    try:
        api = import_module("cuda.bindings.driver")
    except ImportError:
        raise UnsupportedError("the package cuda-bindings is not installed") from None
    return Driver(api, device)
