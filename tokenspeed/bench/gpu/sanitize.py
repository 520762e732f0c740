"""NVIDIA's compute-sanitizer over a small subset of kernels, where the machine has it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenspeed.bench.gpu.publish import Publisher
from tokenspeed.bench.gpu.setup import machine_name
from tokenspeed.bench.gpu.startup import environment
from tokenspeed.bench.record import Target
from tokenspeed.contracts.errors import UnsupportedError

TOOLS = ("memcheck", "racecheck")
PLACES = (Path("/usr/local/cuda/bin/compute-sanitizer"), Path("/usr/local/cuda/compute-sanitizer/compute-sanitizer"))
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
LIMIT_S = 300


def find_sanitizer() -> Path:
    """The program. Raises UnsupportedError where there is none."""
    found = shutil.which("compute-sanitizer")
    places = [Path(found)] if found else [place for place in PLACES if place.exists()]
    if not places:
        raise UnsupportedError(f"compute-sanitizer is not on this machine (looked in PATH and {PLACES[0].parent})")
    return places[0]


def count_errors(output: str) -> int | None:
    """Errors or hazards that a summary tells; None without one: it refused, or the program died."""
    found = [int(errors or hazards) for errors, hazards in SUMMARY.findall(output)]
    return sum(found) if found else None


def run_sanitize(publisher: Publisher, folder: Path, tools: Sequence[str] = TOOLS) -> bool:
    """Whether all that could be run was clean. folder: for compiled kernels, which are made once, without a sanitizer.

    Raises UnsupportedError without the program, RuntimeError where the kernels do not run by themselves.
    """
    program = find_sanitizer()
    child = [sys.executable, "-m", "tokenspeed.bench.gpu.small_kernels"]
    # Every tensor is an allocation of its own, so that reading past it shows.
    around = environment(folder) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    plain = subprocess.run(child, env=around, capture_output=True, text=True, check=False)
    if plain.returncode:
        raise RuntimeError(f"the kernels do not run without a sanitizer either: {plain.stderr.strip()[-800:]}")
    clean = True
    for tool in tools:
        command = [str(program), "--tool", tool, "--report-api-errors", "no", *child]
        errors, output = _watched(command, around)
        print("\n".join(output.splitlines()[-40:]))
        if errors is None:
            print(f"{tool}: refused or cut short, nothing recorded")
            clean = False
            continue
        clean &= errors == 0
        id = f"{machine_name('cuda')}.sanitize.{tool}"
        publisher.add(id, errors, "count", target=Target(at_most=0))
    return clean


def _watched(command: list[str], around: dict[str, str]) -> tuple[int | None, str]:
    try:
        done = subprocess.run(
            command, env=os.environ | around, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no end after {LIMIT_S} s"
    output = done.stdout + done.stderr
    errors = count_errors(output)
    return (None if errors == 0 and done.returncode else errors), output
