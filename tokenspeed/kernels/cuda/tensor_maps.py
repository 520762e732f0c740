"""Tensor maps: how tensors lie in memory, for copies of boxes of them into shared memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from tokenspeed.contracts.errors import DeviceError

TYPES = {
    torch.bfloat16: "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16",
    torch.float8_e4m3fn: "CU_TENSOR_MAP_DATA_TYPE_UINT8",
    torch.int16: "CU_TENSOR_MAP_DATA_TYPE_UINT16",
    torch.int32: "CU_TENSOR_MAP_DATA_TYPE_INT32",
}


class TensorMap(ctypes.Structure):
    """A CUtensorMap, passed by value."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


def encoded(
    what: str,
    address: int,
    dtype: torch.dtype,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzled: bool = False,
) -> TensorMap:
    """A map of five axes, the innermost first, of which elements lie side by side. sizes and box: in elements; strides:
    of the other axes, in bytes, multiples of 16. Past an axis's end are zeros. swizzled: lines of 128 bytes lie in
    shared memory as warpgroup products want them. what: for the error. Raises DeviceError."""
    driver = import_module("cuda.bindings.driver")
    found, swizzle = _aligned(), driver.CUtensorMapSwizzle
    status = encoder()(
        ctypes.byref(found),
        int(getattr(driver.CUtensorMapDataType, TYPES[dtype])),
        5,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 5)(*sizes),
        (ctypes.c_uint64 * 4)(*strides),
        (ctypes.c_uint32 * 5)(*box),
        (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(swizzle.CU_TENSOR_MAP_SWIZZLE_128B if swizzled else swizzle.CU_TENSOR_MAP_SWIZZLE_NONE),
        int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B),
        int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )
    if status:
        raise DeviceError(f"no tensor map for {what}: error {status}")
    return found


def encoder() -> Callable[..., int]:
    """The driver's function."""
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled


def _aligned() -> TensorMap:
    # The driver wants 64 bytes; objects of cuda-bindings and of ctypes begin anywhere.
    buffer = bytearray(ctypes.sizeof(TensorMap) + 64)
    return TensorMap.from_buffer(buffer, -ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % 64)
