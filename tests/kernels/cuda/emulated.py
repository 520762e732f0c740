"""CUDA kernels compiled for the host, their instructions emulated (`emulation/instructions.cuh`): what they
compute, and that barriers and copies go together, can be seen without a GPU. Not speed, nor what a device reorders."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tokenspeed.kernels.cuda import stream as streams
from tokenspeed.kernels.cuda.program import SOURCES
from tokenspeed.kernels.cuda.stream_tiles import Variant

HERE = Path(__file__).parent / "emulation"
PROCESSORS = 2
"""Few, so that a program has several units."""


class EmulatedKernel:
    """In the place of `program.Kernel`. folder: for what is compiled; axis: of the grid, over which `run` goes."""

    def __init__(self, folder: Path, source: str, defines: Mapping[str, int], run: str, axis: int = 0) -> None:
        self.axis = axis
        self.library = folder / "_".join([source, *(str(value) for value in defines.values())]) / "kernel.so"
        if not self.library.exists():
            self.library.parent.mkdir()
            for path in (SOURCES / f"{source}.cu", *SOURCES.glob("*.cuh"), *HERE.glob("*.cuh"), HERE / run):
                shutil.copy(path, self.library.parent)
            given = [f"-D{key}={value}" for key, value in defines.items()]
            command = [
                "c++",
                "-std=c++20",
                "-O1",
                "-shared",
                "-fPIC",
                "-pthread",
                "-w",
                f'-DSOURCE="{source}.cu"',
                *given,
            ]
            subprocess.run([*command, run, "-o", self.library], cwd=self.library.parent, check=True)

    def launch(self, grid: tuple[int, int, int], arguments: Sequence[tuple[Any, Any]]) -> None:
        values = [value if kind is None else kind(value) for value, kind in arguments]
        ctypes.CDLL(str(self.library)).run(grid[self.axis], *values)


def on_host(monkeypatch: pytest.MonkeyPatch, module: Any, kernel: Callable[..., EmulatedKernel]) -> None:
    """Have a module's kernels run on the host in this test."""
    monkeypatch.setattr(module, "kernel", kernel)
    monkeypatch.setattr(module, "device_index", lambda device: 0)


def emulate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Variant]:
    """Have `stream` run on the host in this test; the variants it takes, as they come."""
    seen: list[Variant] = []

    def kernel(found: Variant, device: int) -> EmulatedKernel:
        seen.append(found)
        return EmulatedKernel(folder, found.source, found.defines() | {"ALL_THREADS": found.threads}, "run.cpp")

    on_host(monkeypatch, streams, kernel)
    monkeypatch.setattr(streams, "processors", lambda device: PROCESSORS)
    return seen
