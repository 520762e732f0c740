"""What the soak watches beside its clients: memory and open files of the server's processes, and the engine's pages."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from tokenspeed.bench.sse_client import Client, Endpoint, RequestFailed
from tokenspeed.contracts.errors import ConfigError

_MIB = 2**20
_TRIES = 600
_TRY_S = 0.1


@dataclass(frozen=True)
class Sample:
    """A moment. Memory is resident, in MiB."""

    at: float
    """monotonic seconds"""
    server_mib: float
    engine_mib: float
    files: int
    pages_held: float
    running: float
    waiting: float


class Watcher:
    """Looks at one server and its engine. pid: the serving process's; the engine is its only child."""

    def __init__(self, pid: int, base_url: str) -> None:
        self._pid = pid
        plain = Endpoint.parse(base_url)
        self._client = Client(Endpoint(plain.host, plain.port, "", plain.tls))
        self.samples: list[Sample] = []

    async def run(self, interval_s: float) -> None:
        """Take a sample every so many seconds, until cancelled."""
        while True:
            self.samples.append(await self.sample())
            await asyncio.sleep(interval_s)

    async def sample(self) -> Sample:
        """One, now. Raises ConfigError where a process is gone, RequestFailed where the server does not answer."""
        stats = await self._stats()
        engine = self._engine()
        return Sample(
            monotonic(),
            resident_mib(self._pid),
            resident_mib(engine),
            num_files(self._pid),
            *(stats.get(name, 0.0) for name in ("pages_held", "num_running", "num_waiting")),
        )

    async def left(self) -> dict[str, float]:
        """What is held when all clients have gone and the prefixes are forgotten, by name; waits some seconds for it
        to become nothing."""
        held = await self._held_at_last(("num_running", "num_waiting", "pages_held"))
        try:
            await self._client.post(self._client.endpoint.request("POST", "/admin/reset_prefix_cache", b"{}"))
        except RequestFailed as error:
            return held | {f"prefixes cannot be forgotten: {error}": 1.0}
        return held | await self._held_at_last(("pages_cached",))

    def num_files(self) -> int:
        """Open files of the serving process."""
        return num_files(self._pid)

    def close(self) -> None:
        """Close its connection."""
        self._client.close()

    async def _held_at_last(self, names: tuple[str, ...]) -> dict[str, float]:
        for _ in range(_TRIES):
            stats = await self._stats()
            held = {name: stats.get(name, 0.0) for name in names}
            if not any(held.values()):
                break
            await asyncio.sleep(_TRY_S)
        return held

    async def _stats(self) -> dict[str, float]:
        state: Any = msgspec.json.decode(await self._client.get("/admin/state"))
        return dict(state["stats"])

    def _engine(self) -> int:
        children = _read(self._pid, f"task/{self._pid}/children").split()
        if len(children) != 1:
            raise ConfigError(f"the server has {len(children)} child processes, not an engine alone")
        return int(children[0])


def resident_mib(pid: int) -> float:
    """Raises ConfigError where there is no such process."""
    return int(_read(pid, "statm").split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MIB


def num_files(pid: int) -> int:
    """Open files. Raises ConfigError where there is no such process."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError as error:
        raise ConfigError(f"process {pid} cannot be watched: {error.strerror}") from None


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError as error:
        raise ConfigError(f"process {pid} cannot be watched: {error.strerror}") from None
