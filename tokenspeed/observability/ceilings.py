"""What this machine can do at most, as measured once and cached; `bench.ceilings` measures. No torch."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from tokenspeed.config.paths import user_cache


@dataclass(frozen=True)
class Ceilings:
    """read_gbs: GB/s of reading memory. Matrix rates in TFLOP/s, memory in GB; 0 where not known. threads: used, 0 for
    a GPU."""

    machine: str
    read_gbs: float
    bf16_tflops: float = 0.0
    fp8_tflops: float = 0.0
    threads: int = 0
    memory_gb: float = 0.0


def usable_threads() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))


def read_ceilings() -> Ceilings | None:
    """The cached measurement, if it was made on this processor with this many threads."""
    try:
        found = msgspec.json.decode(_path().read_bytes(), type=Ceilings)
    except (OSError, msgspec.MsgspecError):
        return None
    return found if (found.machine, found.threads) == (processor(), usable_threads()) else None


def write_ceilings(ceilings: Ceilings) -> Path:
    """Cache a measurement; returns the file."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(ceilings))))
    scratch.replace(path)
    return path


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _path() -> Path:
    return user_cache() / "ceilings.json"
