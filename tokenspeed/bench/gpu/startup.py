"""From starting a process to its first token, with a warm kernel cache and a cold one.

Every run is a fresh process (`start_child`), which prints when each phase ended. The cold one has empty folders for
what Triton, the driver and this engine keep; the warm ones have what it left there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from tokenspeed.bench.gpu.publish import Publisher
from tokenspeed.bench.gpu.setup import Setup
from tokenspeed.contracts.errors import ConfigError

WARM_RUNS = 2
CACHES = {"TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "user", "CUDA_CACHE_PATH": "driver"}
"""Environment variables of what is kept between runs, and folders for it."""
LAST = "first_token"


def run_startup(setup: Setup, publisher: Publisher, warm_runs: int = WARM_RUNS) -> None:
    """One cold start and some warm ones, in seconds; samples: when each phase ended, since the start of the process."""
    with tempfile.TemporaryDirectory() as folder:
        cold = start(setup, Path(folder))
        warm = [start(setup, Path(folder)) for _ in range(warm_runs)]
    for kind, runs in (("warm", warm), ("cold", [cold])):
        samples = {phase: [run[phase] for run in runs] for phase in cold}
        publisher.add(setup.id("start", kind), median(run[LAST] for run in runs), "s", samples=samples)
        print("  ended after s:", ", ".join(f"{phase} {median(found):.2f}" for phase, found in samples.items()))


def start(setup: Setup, caches: Path) -> dict[str, float]:
    """Seconds from before the process was started to the end of each of its phases. Raises ConfigError with its last
    words where it fails."""
    command = [sys.executable, "-m", "tokenspeed.bench.gpu.start_child", setup.model, setup.quantization or "none"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, setup.device], env=environment(caches), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"the process that was to start {setup.name} failed: {done.stderr.strip()[-800:]}")
    ended: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return since(started, ended)


def since(started: float, ended: Mapping[str, float]) -> dict[str, float]:
    """Monotonic times as seconds after `started`; the clock is the machine's, so processes share it."""
    return {phase: moment - started for phase, moment in ended.items()}


def environment(caches: Path) -> dict[str, str]:
    """This process's, with caches in a folder, and the package of this source tree first."""
    here = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    return os.environ | {name: str(caches / folder) for name, folder in CACHES.items()} | {"PYTHONPATH": path}
