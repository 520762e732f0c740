"""Programs in processes of their own, with their peak of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenspeed.contracts.errors import ConfigError

_LAUNCHER = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, capture_output=True)
out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
json.dump([done.returncode, out, err, kib], sys.stdout)
"""
_SPINNER = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
print("spinning", flush=True)
while os.getppid() == int(sys.argv[2]):
    for _ in range(1_000_000):
        pass
"""


@dataclass(frozen=True)
class Done:
    """A program that has ended well. peak_mb: the most memory it had resident at once, in 1e6 bytes."""

    stdout: str
    stderr: str
    peak_mb: float


def run_program(command: Sequence[str | Path]) -> Done:
    """Run a program to its end. Raises ConfigError with the end of its stderr where it fails.

    The kernel lets a program's peak begin with that of the process which started it: a small one stands in between.
    """
    program = [str(part) for part in command]
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *program]
    launched = subprocess.run(launcher, capture_output=True, text=True, check=False)
    if launched.returncode:
        raise ConfigError(f"{program[0]} could not be run: {launched.stderr.strip()[-500:]}")
    status, out, err, peak_kib = json.loads(launched.stdout)
    if status:
        raise ConfigError(f"{program[0]} failed ({status}): {err.strip()[-500:]}")
    return Done(out, err, peak_kib * 1024 / 1e6)


@contextmanager
def busy_core() -> Iterator[int]:
    """Keep one of this process's cores busy with another process that is pinned to it; gives the core's number.

    Raises ConfigError where this process has a single core.
    """
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        raise ConfigError("keeping one core busy needs two, and this process may use one")
    core = max(cores)
    command = [sys.executable, "-I", "-S", "-c", _SPINNER, str(core), str(os.getpid())]
    spinner = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert spinner.stdout is not None
        if spinner.stdout.readline() != b"spinning\n":
            raise ConfigError(f"the process that keeps core {core} busy did not start")
        yield core
    finally:
        spinner.kill()
        spinner.communicate()
