"""The engine process: reads what to load, steps while there is work, sleeps otherwise."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

import msgspec

from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import TokenSpeedError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.engine.ipc import EngineChannel
from tokenspeed.engine.messages import (
    Abort,
    Changed,
    EngineInfo,
    ErrorInfo,
    Failed,
    Forget,
    Loading,
    Profile,
    Profiled,
    Ready,
    Refused,
    Sleep,
    Start,
    Step,
    Stop,
    Submit,
    ToEngine,
    Wake,
)
from tokenspeed.engine.trace import StepTrace
from tokenspeed.observability.metrics import Histogram

REPORT_S = 0.25
"""Longest silence of an engine that is not caught in a step, and the interval of its counters, in seconds."""
FAILED = 1
"""Exit status after a start or a step that failed."""
ORPHANED = 3
"""Exit status of an engine whose serving process is gone."""


class Core(Protocol):
    """What steps: a model, a scheduler, an executor."""

    trace: StepTrace | None
    """Where `step` notes its phases."""
    started: list[tuple[str, float]]
    """Requests that the last `step` fed for the first time, and the seconds they had waited."""
    step_times: Histogram
    """Of all steps, over STEP_BOUNDS."""

    def add(self, request: Request) -> None:
        """Queue a request. A TokenSpeedError refuses it and leaves no trace; any other exception ends the process."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> object:
        """End a request, or one of its sequences; unknown ids are nothing. What it returns is not looked at."""
        ...

    def step(self) -> list[SequenceUpdate]:
        """Launch or finish a step; what it brought."""
        ...

    @property
    def num_steps(self) -> int:
        """Steps finished since the start: the proof of progress."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do: a request waits or runs, or a step is in flight."""
        ...

    def stats(self) -> Mapping[str, float]:
        """Counters and gauges by name."""
        ...

    @property
    def asleep(self) -> bool:
        """Whether it takes no requests before it is woken."""
        ...

    def sleep(self, level: int = 1) -> None:
        """Give back the memory of the KV cache. Raises a TokenSpeedError; `asleep` says how it ended."""
        ...

    def wake(self) -> None:
        """Take it again. Raises a TokenSpeedError where it goes on sleeping."""
        ...

    def forget_prefixes(self) -> None:
        """Drop the prefixes that the cache holds. Raises EngineBusyError while a request is alive."""
        ...

    def close(self) -> None:
        """Release the device."""
        ...


Progress = Callable[[int, int], None]
Build = Callable[[EngineConfig, Progress], tuple[Core, EngineInfo]]
"""Loads a model; may call the second argument with (done, total), from the calling thread."""


def run(build: Build) -> int:
    """Be the engine process, until it is told to stop or nobody is left to serve. Returns the exit status.

    stdin: one line, a `messages.Start`, then nothing; its end is the end of the serving process.
    """
    _leave_signals_to_the_parent()
    line = sys.stdin.buffer.readline()
    if not line:
        return ORPHANED
    start = msgspec.json.decode(line, type=Start)
    _watch_parent()
    channel = EngineChannel(start.fd)
    try:
        return _build_and_serve(build, start.config, channel)
    finally:
        channel.close()


def _build_and_serve(build: Build, config: EngineConfig, channel: EngineChannel) -> int:
    try:
        core, info = build(config, lambda done, total: channel.send(Loading(done, total)))
    except Exception as error:
        if not isinstance(error, TokenSpeedError):
            traceback.print_exc()
        channel.send(Failed(ErrorInfo.of(error)))
        return FAILED
    # What is loaded stays: the collector need not walk it again.
    gc.collect()
    gc.freeze()
    channel.send(Ready(info))
    try:
        serve(core, channel)
    except Exception as error:
        traceback.print_exc()
        channel.send(Failed(ErrorInfo.of(error)))
        return FAILED
    core.close()
    return 0


def serve(core: Core, channel: EngineChannel) -> None:
    """Take in messages and step until a Stop comes. Raises what a step raises."""
    reported, taken = time.monotonic(), 0
    started: list[tuple[str, float]] = []
    while True:
        for message in channel.receive(wait=not core.has_work):
            if isinstance(message, Stop):
                return
            _take(core, channel, message)
            taken += 1
        updates: list[SequenceUpdate] = []
        if core.has_work:
            updates = core.step()
            started += core.started
        idle, now = not core.has_work, time.monotonic()
        due = idle or now - reported >= REPORT_S
        if updates or due:
            stats = dict(core.stats()) if due else None
            began = time.perf_counter()
            times = core.step_times.state() if due else []
            channel.send(Step(updates, core.num_steps, taken if idle else None, stats, started, times))
            started = []
            if core.trace is not None and updates:
                core.trace.add("send", began, time.perf_counter(), core.num_steps - 1)
            reported = now if due else reported
        if core.trace is not None and core.num_steps >= core.trace.until:
            _end_trace(core, channel)


def _take(core: Core, channel: EngineChannel, message: ToEngine) -> None:
    if isinstance(message, Abort):
        core.abort(message.request_id, message.index)
    elif isinstance(message, Submit):
        try:
            core.add(message.request)
        except TokenSpeedError as error:
            channel.send(Refused(message.request.request_id, ErrorInfo.of(error)))
    elif isinstance(message, Sleep | Wake | Forget):
        channel.send(_changed(core, message))
    elif isinstance(message, Profile):
        _end_trace(core, channel)
        if message.steps:
            core.trace = StepTrace(core.num_steps + message.steps)


def _end_trace(core: Core, channel: EngineChannel) -> None:
    if core.trace is not None:
        channel.send(Profiled(core.trace.spans))
        core.trace = None


def _changed(core: Core, message: Sleep | Wake | Forget) -> Changed:
    try:
        if isinstance(message, Sleep):
            core.sleep(message.level)
        elif isinstance(message, Wake):
            core.wake()
        else:
            core.forget_prefixes()
    except TokenSpeedError as error:
        return Changed(core.asleep, ErrorInfo.of(error))
    return Changed(core.asleep)


def _leave_signals_to_the_parent() -> None:
    """A signal to the whole group, as Ctrl-C sends it, is the serving process's to answer: it drains first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A serving process that sees no progress asks for the stacks of all threads this way.
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def _watch_parent() -> None:
    def wait_for_the_end() -> None:
        with suppress(OSError):
            while os.read(sys.stdin.fileno(), 4096):
                pass
        os._exit(ORPHANED)

    threading.Thread(target=wait_for_the_end, name="watch-parent", daemon=True).start()
