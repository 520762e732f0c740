"""How fast the machine's clocks say that they run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from statistics import mean

import msgspec

from tokenspeed.bench.record import Machine

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
CPUINFO = Path("/proc/cpuinfo")
_FIELDS = {"name": "", "driver_version": "", "clocks.sm": "MHz", "clocks.mem": "MHz", "power.limit": "W"}


def clocks() -> dict[str, str | float]:
    """By name: the governor, the mean of the cores' MHz, and each GPU's name, driver, clocks and power limit by
    nvidia-smi. What the machine does not tell is left out."""
    found: dict[str, str | float] = {}
    governor = _text(GOVERNOR).strip()
    if governor:
        found["cpu.governor"] = governor
    cores = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text(CPUINFO), re.MULTILINE)
    if cores:
        found["cpu.mhz"] = round(mean(map(float, cores)), 1)
    for number, values in enumerate(_gpus()):
        for field, value in zip(_FIELDS, values, strict=False):
            found[f"gpu{number}.{field}"] = f"{value} {_FIELDS[field]}".strip()
    return found


def with_gpus(machine: Machine) -> Machine:
    """A machine with the GPUs that nvidia-smi lists."""
    gpus = _gpus()
    return msgspec.structs.replace(machine, gpu=gpus[0][0], gpus=len(gpus)) if gpus else machine


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _gpus() -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]
