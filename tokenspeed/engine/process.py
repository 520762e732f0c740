"""The engine process as the serving process sees it: starting it, noticing its end, ending it."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from tokenspeed.config.engine import EngineConfig
from tokenspeed.engine.messages import Start

CORE_COMMAND = (sys.executable, "-m", "tokenspeed.engine.core")
"""Started by name: importing it would bring torch into the serving process."""


class EngineProcess:
    """A running engine process. Its log is this process's stderr; it ends when this process does, however that
    happens."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(
        cls, end: socket.socket, config: EngineConfig, command: Sequence[str] | None = None
    ) -> EngineProcess:
        """Start `command`, which inherits `end` of the socket, and tell it what to load."""
        process = await asyncio.create_subprocess_exec(
            *(command or CORE_COMMAND),
            stdin=asyncio.subprocess.PIPE,  # stays open as long as this process lives: see messages.Start
            pass_fds=(end.fileno(),),
            start_new_session=True,  # Ctrl-C must reach this process alone, which then drains
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(Start(fd=end.fileno(), config=config)) + b"\n")
        with suppress(ConnectionError):  # it is gone already: `wait` tells
            await process.stdin.drain()
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Wait for its end. Returns its exit status, or minus the signal that ended it."""
        return await self._process.wait()

    async def end(self, timeout: float) -> None:
        """Wait `timeout` seconds for its end, then kill it."""
        try:
            await asyncio.wait_for(self._process.wait(), timeout)
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def dump_stacks(self) -> None:
        """Have it write the stacks of all its threads to its log."""
        self._signal(signal.SIGUSR1)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)


def exit_text(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}"
    names = {member.value: member.name for member in signal.Signals}
    return f"was killed by signal {-status} ({names.get(-status, 'unknown')})"
