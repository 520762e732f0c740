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

from tokenspeed.kernels.cuda import experts
from tokenspeed.kernels.cuda import stream as streams
from tokenspeed.kernels.cuda.program import SOURCES
from tokenspeed.kernels.cuda.stream import Variant

HERE = Path(__file__).parent / "emulation"
PROCESSORS = 2
"""Few, so that a program has several units."""


class EmulatedKernel:
    """In the place of `program.Kernel`. folder: for what is compiled."""

    def __init__(self, found: Variant | experts.Variant, folder: Path) -> None:
        source, run = (found.source, "run.cpp") if isinstance(found, Variant) else ("experts", "run_experts.cpp")
        name = "_".join([source, *(str(value) for value in found.defines().values())])
        self.library = folder / name / "stream.so"
        if not self.library.exists():
            self.library.parent.mkdir()
            for given in (f"{source}.cu", "narrow_products.cuh", "units.cuh", "row.cuh"):
                shutil.copy(SOURCES / given, self.library.parent)
            for given in ("instructions.cuh", run):
                shutil.copy(HERE / given, self.library.parent)
            defines = [f"-D{key}={value}" for key, value in found.defines().items()]
            defines += [f'-DSOURCE="{source}.cu"', f"-DALL_THREADS={found.threads}"]
            command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", *defines]
            subprocess.run([*command, run, "-o", self.library], cwd=self.library.parent, check=True)

    def launch(self, grid: tuple[int, int, int], arguments: Sequence[tuple[Any, Any]]) -> None:
        values = [value if kind is None else kind(value) for value, kind in arguments]
        ctypes.CDLL(str(self.library)).run(grid[0], *values)


def emulate(monkeypatch: Any, folder: Path, room: Any = streams) -> list[Any]:
    """Have `stream`, or `experts`, run on the host in this test; the variants it takes, as they come."""
    seen: list[Any] = []

    def kernel(found: Any, device: int) -> EmulatedKernel:
        seen.append(found)
        return EmulatedKernel(found, folder)

    def cpu(device: torch.device) -> int:
        return 0

    monkeypatch.setattr(room, "kernel", kernel)
    monkeypatch.setattr(room, "device_index", cpu)
    monkeypatch.setattr(room, "processors", lambda device: PROCESSORS)
    return seen
