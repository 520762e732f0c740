"""CUDA C++ compiled at first use by NVRTC, kept on disk by content and architecture, and launched in torch's stream.

Both libraries come through cuda-bindings, an optional package.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tokenspeed.contracts.errors import DeviceError

SOURCES = Path(__file__).parent
Argument = tuple[Any, Any]
"""A kernel's argument and its ctypes type."""


def compiled(name: str, defines: Mapping[str, int], architecture: str) -> bytes:
    """The cubin of NAME.cu, from disk where it has been made before. Raises DeviceError with the compiler's words."""
    source, headers = (SOURCES / f"{name}.cu").read_text(), shared_headers()
    nvrtc = import_module("cuda.bindings.nvrtc")
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        *(f"-D{key}={defines[key]}" for key in sorted(defines)),
    ]
    key = hashlib.sha256(repr((source, headers, options, nvrtc.nvrtcVersion())).encode()).hexdigest()[:32]
    kept = _cache_dir() / f"{name}-{key}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    cubin = _compile(nvrtc, name, source, headers, options)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_bytes(cubin)
    partial.replace(kept)
    return cubin


def compiler_found() -> bool:
    """Whether NVRTC's library can be loaded: cuda-bindings comes without it."""
    try:
        return not import_module("cuda.bindings.nvrtc").nvrtcVersion()[0].value
    except (ImportError, OSError, RuntimeError):
        return False


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tokenspeed" / "cuda"


def shared_headers() -> dict[str, str]:
    """Contents of what sources may include, by name."""
    return {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cuh"))}


def _compile(nvrtc: Any, name: str, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
    contents, names = [text.encode() for text in headers.values()], [name.encode() for name in headers]
    status, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), len(names), contents, names)
    _check(status, "nvrtcCreateProgram")
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status.value:
        log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
        nvrtc.nvrtcGetProgramLog(program, log)
        raise DeviceError(f"{name}.cu with {' '.join(options)} does not compile:\n{log.decode().strip()}")
    size = nvrtc.nvrtcGetCUBINSize(program)[1]
    cubin = b" " * size
    _check(nvrtc.nvrtcGetCUBIN(program, cubin)[0], "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


class Kernel:
    """One function on the current device. shared: bytes of dynamic shared memory it is launched with. cluster: programs
    along the first axis that run side by side and reach each other's shared memory (more than 8: not on every GPU)."""

    def __init__(self, cubin: bytes, function: str, threads: int, shared: int, cluster: int = 1) -> None:
        self._driver = driver = import_module("cuda.bindings.driver")
        status, self._module = driver.cuModuleLoadData(cubin)
        _check(status, "cuModuleLoadData")
        status, self._function = driver.cuModuleGetFunction(self._module, function.encode())
        _check(status, "cuModuleGetFunction")
        names = driver.CUfunction_attribute
        self._set(names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        _divide(driver, self._function)
        self._config = config = driver.CUlaunchConfig()
        config.blockDimY = config.blockDimZ = 1
        config.blockDimX, config.sharedMemBytes = threads, shared
        ahead = driver.CUlaunchAttribute()
        ahead.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        ahead.value.programmaticStreamSerializationAllowed = 1
        attributes = [ahead]
        if cluster > 1:
            self._set(names.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
            attributes.append(_cluster_attribute(driver, cluster))
        config.attrs, config.numAttrs = attributes, len(attributes)

    def _set(self, attribute: Any, value: int) -> None:
        _set(self._driver, self._function, attribute, value)

    def launch(self, grid: tuple[int, int, int], arguments: Sequence[Argument]) -> None:
        """Launch ahead of the kernel in front (programmatic dependent launch), in torch's current stream."""
        self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = grid
        self._config.hStream = torch.cuda.current_stream().cuda_stream
        values, types = zip(*arguments, strict=True)
        _check(self._driver.cuLaunchKernelEx(self._config, self._function, (values, types), 0)[0], "cuLaunchKernelEx")


@cache
def divide_alike() -> None:
    """Have Triton's kernels, loaded from now on, divide a processor's memory as the kernels of this room do."""
    driver = import_module("cuda.bindings.driver")

    def loaded(module: object, function: int, name: str, group: object, key: str) -> None:
        _divide(driver, driver.CUfunction(function))

    import_module("triton").knobs.runtime.kernel_load_end_hook.add(loaded)


def _divide(driver: Any, function: Any) -> None:
    # The same for all kernels: before a processor divides its memory anew it must run empty.
    _set(driver, function, driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)


def _set(driver: Any, function: Any, attribute: Any, value: int) -> None:
    _check(driver.cuFuncSetAttribute(function, attribute, value)[0], "cuFuncSetAttribute")


def _cluster_attribute(driver: Any, programs: int) -> Any:
    made = driver.CUlaunchAttribute()
    made.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    made.value.clusterDim.x, made.value.clusterDim.y, made.value.clusterDim.z = programs, 1, 1
    return made


def pointer(tensor: torch.Tensor | None) -> Argument:
    """A tensor's address, 0 for none."""
    return (0 if tensor is None else tensor.data_ptr(), ctypes.c_void_p)


@cache
def processors(index: int) -> int:
    """How many streaming multiprocessors a device has."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def architecture(index: int) -> str:
    """Of a device, as NVRTC names it, with the instructions that only this one has."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def _check(status: Any, call: str) -> None:
    if status.value:
        raise DeviceError(f"{call} failed with {status.name}")
