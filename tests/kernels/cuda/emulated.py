"""The streaming kernels compiled for the host, their instructions emulated (`emulation/instructions.cuh`): what they
compute, and that barriers and copies go together, can be seen without a GPU. Not speed, nor what a device reorders."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokenspeed.kernels.cuda import stream as streams
from tokenspeed.kernels.cuda.program import SOURCES
from tokenspeed.kernels.cuda.stream import Variant

HERE = Path(__file__).parent / "emulation"
PROCESSORS = 2
"""Few, so that a program has several units."""


class EmulatedKernel:
    """In the place of `program.Kernel`. folder: for what is compiled."""

    def __init__(self, found: Variant, folder: Path) -> None:
        name = "_".join([found.source, *(str(value) for value in found.defines().values())])
        self.library = folder / name / "stream.so"
        if not self.library.exists():
            self.library.parent.mkdir()
            for source in (f"{found.source}.cu", "narrow_products.cuh", "units.cuh", "row.cuh"):
                shutil.copy(SOURCES / source, self.library.parent)
            for source in ("instructions.cuh", "run.cpp"):
                shutil.copy(HERE / source, self.library.parent)
            defines = [f"-D{key}={value}" for key, value in found.defines().items()]
            defines += [f'-DSOURCE="{found.source}.cu"', f"-DALL_THREADS={found.threads}"]
            command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", *defines]
            subprocess.run([*command, "run.cpp", "-o", self.library], cwd=self.library.parent, check=True)

    def launch(self, grid: tuple[int, int, int], arguments: Sequence[tuple[Any, Any]]) -> None:
        values = [value if kind is None else kind(value) for value, kind in arguments]
        ctypes.CDLL(str(self.library)).run(grid[0], *values)


def emulate(monkeypatch: Any, folder: Path) -> list[Variant]:
    """Have `stream` run on the host in this test; the variants it takes, as they come."""
    seen: list[Variant] = []

    def kernel(found: Variant, device: int) -> EmulatedKernel:
        seen.append(found)
        return EmulatedKernel(found, folder)

    def cpu(device: torch.device) -> int:
        return 0

    monkeypatch.setattr(streams, "kernel", kernel)
    monkeypatch.setattr(streams, "device_index", cpu)
    monkeypatch.setattr(streams, "processors", lambda device: PROCESSORS)
    return seen
