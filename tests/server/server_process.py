"""A server as a process of its own, and its address."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).parents[2]
GUARD_S = 60.0
"""Against hanging only."""


@dataclass
class ServerProcess:
    """`log` grows with its stderr."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)
    _reader: threading.Thread | None = None

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=GUARD_S, verify=False)

    def post(self, path: str, **fields: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=fields, timeout=GUARD_S, verify=False)

    def wait_until_ready(self) -> None:
        end = time.monotonic() + GUARD_S
        while self.get("/health").status_code != 200:
            assert time.monotonic() < end, self.log
            assert self.process.poll() is None, self.log
            time.sleep(0.02)

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(GUARD_S)
        if self._reader is not None:
            self._reader.join(GUARD_S)
        return status

    def children(self) -> list[int]:
        """Process ids."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in listed]


@contextlib.contextmanager
def started(module: str, arguments: Sequence[str]) -> Iterator[ServerProcess]:
    """Start `python -m module arguments`, wait for its address (or its end), kill it in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    server = ServerProcess(process)
    known = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.log.append(line.rstrip("\n"))
            if match := re.search(r'listening on (https?://[^\s"]+)', line):
                server.url = match[1]
                known.set()
        known.set()

    server._reader = threading.Thread(target=read, daemon=True)
    server._reader.start()
    try:
        assert known.wait(GUARD_S)
        yield server
    finally:
        process.kill()
        process.wait()
        server._reader.join(GUARD_S)
        assert process.stderr is not None
        process.stderr.close()


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
