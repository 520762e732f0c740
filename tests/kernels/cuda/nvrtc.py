"""Compiles a CUDA source for a look at what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from tokenspeed.kernels.cuda import program


def compile_(name: str, defines: Mapping[str, int], architecture: str) -> tuple[str, str]:
    """The compiler's log with the resources used, and the PTX."""
    nvrtc = import_module("cuda.bindings.nvrtc")
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-D{key}={int(value)}" for key, value in defines.items()]
    headers = program.shared_headers()
    contents, names = [text.encode() for text in headers.values()], [header.encode() for header in headers]
    source = (program.SOURCES / f"{name}.cu").read_bytes()
    _, made = nvrtc.nvrtcCreateProgram(source, f"{name}.cu".encode(), len(names), contents, names)
    (status,) = nvrtc.nvrtcCompileProgram(made, len(options), [option.encode() for option in options])
    log = b" " * nvrtc.nvrtcGetProgramLogSize(made)[1]
    nvrtc.nvrtcGetProgramLog(made, log)
    assert not status.value, log.decode()
    ptx = b" " * nvrtc.nvrtcGetPTXSize(made)[1]
    nvrtc.nvrtcGetPTX(made, ptx)
    return log.decode(), ptx.decode()
