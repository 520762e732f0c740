"""Calls of CUDA's driver that are over in some microseconds, made without giving up the interpreter's lock.

torch gives it up around each of its calls. With several readers somebody else then holds it, and getting it back means
to be woken: some 200 us for each part, whatever the number of readers (eight brought 37 GB/s to an H200 whose link
takes 55).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from tokenspeed.contracts.errors import DeviceError


class DriverCalls:
    """In the context that is current in the thread that makes this."""

    def __init__(self, library: Any) -> None:
        """library: libcuda. Raises DeviceError where no context is current."""
        address, handle = ctypes.c_uint64, ctypes.c_void_p
        self._library, self._context = library, ctypes.c_void_p()
        library.cuCtxSetCurrent.argtypes = [handle]
        library.cuMemcpyHtoDAsync_v2.argtypes = [address, handle, ctypes.c_size_t, handle]
        library.cuStreamWaitEvent.argtypes = [handle, handle, ctypes.c_uint]
        _check("cuCtxGetCurrent", library.cuCtxGetCurrent(ctypes.byref(self._context)))
        if not self._context:
            raise DeviceError("CUDA's driver has no context in this thread")

    def enter(self) -> None:
        """Make the context current in the calling thread."""
        _check("cuCtxSetCurrent", self._library.cuCtxSetCurrent(self._context))

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Copy pinned memory to the device; only asked for when this returns."""
        _check("cuMemcpyHtoDAsync", self._library.cuMemcpyHtoDAsync_v2(to, source, nbytes, stream))

    def wait(self, stream: int, event: int) -> None:
        """Let a stream wait for what an event was last recorded behind."""
        _check("cuStreamWaitEvent", self._library.cuStreamWaitEvent(stream, event, 0))


def _check(call: str, code: int) -> None:
    if code:
        raise DeviceError(f"{call} failed with CUDA error {code}")


def driver_calls(device: torch.device) -> DriverCalls | None:
    """Those of a CUDA device; None where there is no such driver."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    torch.cuda.synchronize(device)  # makes its context current
    try:
        return DriverCalls(ctypes.PyDLL("libcuda.so.1"))
    except OSError:
        return None
