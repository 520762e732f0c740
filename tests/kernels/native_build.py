"""Builds of the native test program: one folder each below build/native, kept from run to run."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "native"
ARM = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++")


@dataclass(frozen=True)
class Build:
    """Compiler flags and CMake options of a build."""

    name: str
    flags: str
    options: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    def program(self) -> str:
        """Make it, or what is new of it; the program's path. Raises AssertionError with the compiler's words."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        configure = [f"-S{ROOT}", f"-B{self.folder}", "-DTOKENSPEED_NATIVE_TESTS=ON", "-DCMAKE_BUILD_TYPE=None"]
        with open(FOLDER / f"{self.name}.lock", "w") as lock:  # another worker may be at it
            fcntl.flock(lock, fcntl.LOCK_EX)
            _cmake(*configure, f"-DCMAKE_CXX_FLAGS={self.flags}", *self.options)
            _cmake("--build", str(self.folder), "--parallel", "2")
        return str(self.folder / "native_kernels")


PLAIN = Build("plain", "-O1")
RELEASE = Build("release", "", ("-DCMAKE_BUILD_TYPE=Release",))
MEMORY = Build("memory", "-O1 -g1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all")
THREADS = Build("threads", "-O1 -g1 -fsanitize=thread")
NEON = Build("neon", "-O1", (*ARM, "-DCMAKE_EXE_LINKER_FLAGS=-static"))


def run(command: Sequence[str], expected: int = 0) -> str:
    """The output of a command that must end with the code expected."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == expected, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


def _cmake(*arguments: str) -> None:
    here = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=f"{here}{os.pathsep}{os.environ['PATH']}")
    assert cmake, "cmake is needed to build the native tests"
    # These tests may run below a make that hands down its flags.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run([cmake, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"cmake {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
