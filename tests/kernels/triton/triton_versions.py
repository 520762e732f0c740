"""Children that compile kernels, under the installed Triton or under another version of it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
INSTALLED = "installed"
VERSIONS = (INSTALLED, "3.6.0")
"""The second is the oldest that the package takes."""


def paths_of(target: str) -> str:
    """What is compiled: "product", every path of every kernel, for Hopper; "each", every kernel once or more,
    elsewhere."""
    return "product" if target == "sm_90" else "each"


def child_environment(version: str = INSTALLED) -> dict[str, str]:
    """Of a child whose kernels are not interpreted."""
    path = [str(ROOT)] if version == INSTALLED else [str(_installed(version)), str(ROOT)]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join(path), "TRITON_DEFAULT_FP_FUSION": "1"}


def _installed(version: str) -> Path:
    """A folder with that Triton alone, fetched once for all workers."""
    folder = ROOT / "build" / f"triton-{version}"
    folder.parent.mkdir(exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
            subprocess.run([*pip, f"triton=={version}"], check=True)
            (folder / "complete").touch()
    return folder
