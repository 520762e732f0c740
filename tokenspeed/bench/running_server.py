"""A server as a process of its own, from its start to its end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tokenspeed.contracts.errors import ConfigError

READY_S = 180.0
"""How long a server may take to load."""
_END_S = 40.0
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class RunningServer:
    """Answers at `url`. pid: of the process that was started."""

    url: str
    pid: int


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def our_command(port: int, model: Path | str, *flags: str) -> list[str]:
    """`tokenspeed serve`, by the interpreter that runs this."""
    return [sys.executable, "-m", "tokenspeed.cli.main", "serve", str(model), "--port", str(port), *flags]


@contextmanager
def serving(command: Sequence[str | Path], port: int, ready_s: float = READY_S) -> Iterator[RunningServer]:
    """Start a server, wait at most `ready_s` until /health at `port` is a 200, and end it with SIGTERM.

    Raises ConfigError with the end of its log where it cannot be started, or ends before its time.
    """
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be run: {error.strerror}") from None
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}", log, ready_s)
            yield RunningServer(f"http://127.0.0.1:{port}", process.pid)
            if process.poll() is not None:
                raise ConfigError(f"{command[0]} has ended with status {process.returncode}: {_end_of(log)}")
        finally:
            _end(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: IO[bytes], ready_s: float) -> None:
    end = time.monotonic() + ready_s
    while not _is_ready(url):
        if process.poll() is not None:
            raise ConfigError(f"the server ended with status {process.returncode}: {_end_of(log)}")
        if time.monotonic() > end:
            raise ConfigError(f"the server was not ready within {ready_s:g} s: {_end_of(log)}")
        time.sleep(0.1)


def _is_ready(url: str) -> bool:
    try:
        with _opener.open(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _end_of(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace").strip()[-1000:]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
