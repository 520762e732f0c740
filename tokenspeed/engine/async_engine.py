"""`AsyncEngine`: the engine in a process of its own, and a stream of outputs for each request. No torch here."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import EngineBusyError, EngineClosedError, EngineDeadError, TokenSpeedError
from tokenspeed.contracts.request import SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams, refuse_processors
from tokenspeed.contracts.step import Pooling
from tokenspeed.engine.intake import Intake, open_tokenizer
from tokenspeed.engine.ipc import ServingChannel
from tokenspeed.engine.loop import FAILED
from tokenspeed.engine.messages import (
    Abort,
    Changed,
    EngineInfo,
    Failed,
    Forget,
    FromEngine,
    Loading,
    Profile,
    Profiled,
    Ready,
    Refused,
    Sleep,
    Step,
    Stop,
    Submit,
    Wake,
)
from tokenspeed.engine.process import EngineProcess, exit_text
from tokenspeed.engine.sleep import asleep_error, check_level, wakes_cache
from tokenspeed.engine.stream import Outbox, RequestStream
from tokenspeed.engine.trace import Span
from tokenspeed.tokenizer.base import Tokenizer

logger = logging.getLogger("tokenspeed")
STUCK_AFTER_S = 60.0
"""A slow processor may need tens of seconds for one step of a long prompt."""
CLOSE_S = 5.0
"""How long a process that was told to stop may take before it is killed."""
SLEEP_AFTER_S = 30.0
"""How long requests under way may go on before an engine that is to sleep aborts them."""
_LAST_WORDS_S = 1.0
_STACKS_S = 0.5
"""How long a stuck process gets to write the stacks of its threads."""
Progress = Callable[[int, int], None]


class Health(NamedTuple):
    """ok: a step finished lately, or there is nothing to do. reason: what the engine does, or what is wrong."""

    ok: bool
    reason: str


class AsyncEngine:
    """One engine process and the streams of its requests. Made by `start`; used from the event loop it was started
    on."""

    info: EngineInfo
    tokenizer: Tokenizer | None
    """None for a model without one: it takes and gives ids alone."""

    def __init__(self, config: EngineConfig, progress: Progress | None, stuck_after_s: float) -> None:
        self.config = config
        self._report = progress
        self._stuck_after_s = stuck_after_s
        self._channel = ServingChannel(self._receive)
        self._process: EngineProcess | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._failed, self._unwell = asyncio.Event(), asyncio.Event()
        self._refusal: TokenSpeedError | None = None
        self._death: EngineDeadError | None = None
        self._closed = False
        self._asleep = False
        """Also while it falls asleep."""
        self._one_change = asyncio.Lock()
        self._changes: deque[asyncio.Future[None]] = deque()
        self._profiles: deque[asyncio.Future[list[Span]]] = deque()
        self._paused = False
        self._held: dict[str, Submit] = {}
        """Requests that came while it was paused; the engine does not know them."""
        self._outboxes: dict[str, Outbox] = {}
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._numbers = itertools.count()
        self._num_sent = self._num_steps = 0
        self._idle_after: int | None = 0
        self._progressed = time.monotonic()
        self._stats: dict[str, float] = {}
        self._step_times: list[float] = []

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        core_command: Sequence[str] | None = None,
        progress: Progress | None = None,
        stuck_after_s: float = STUCK_AFTER_S,
    ) -> AsyncEngine:
        """Start the process and wait until the model is loaded.

        core_command: what to run instead of `python -m tokenspeed.engine.core`. progress: called while it loads, with
        bytes (done, total). stuck_after_s: an engine with work and no finished step for this long is unwell.
        Raises what the start raised in the process: ModelNotFoundError, ConfigError, MemoryLimitError and so on;
        EngineDeadError where it ended otherwise.
        """
        engine = cls(config, progress, stuck_after_s)
        try:
            await engine._launch(core_command)
        except BaseException:
            await engine._end(timeout=0)
            raise
        return engine

    async def _launch(self, core_command: Sequence[str] | None) -> None:
        self._process = await EngineProcess.start(self._channel.engine_end, self.config, core_command)
        self._channel.connected()
        self._watchers = [
            asyncio.create_task(self._watch_process(self._process)),
            asyncio.create_task(self._watch_progress(self._process)),
        ]
        info = self.info = await self._ready
        self.tokenizer = None
        if info.path is not None and info.format is not None:
            self.tokenizer = await asyncio.to_thread(open_tokenizer, info.path, info.format, info.model)
        self._intake = Intake(info, self.tokenizer, self.config.seed)

    def default_sampling_params(self) -> SamplingParams:
        """SamplingParams with the defaults the checkpoint states."""
        return SamplingParams.from_dict(dict(self.info.sampling_defaults))

    def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams | Pooling,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> RequestStream:
        """Queue a request, and give the stream of its outputs, cumulative or not as `params.output_kind` says; of
        Pooling it is one output, whose `pooled` is set.

        Raises PromptError and ParameterError on what is seen to be wrong here, EngineClosedError, EngineAsleepError,
        EngineDeadError. What the engine itself refuses is raised by the stream.
        """
        self._check_open()
        if self._asleep:
            raise asleep_error()
        if isinstance(params, SamplingParams):
            refuse_processors(params)
        number = next(self._numbers)
        shown_id = str(number) if request_id is None else request_id
        # Ids that users chose may come again while late updates of an aborted request are still under way.
        wire_id = f"{shown_id}-{number:x}"
        request = self._intake.request(wire_id, prompt, params, priority, cache_salt)
        text = prompt if isinstance(prompt, str) else None
        outbox = Outbox(request, shown_id, text, self.tokenizer)
        self._outboxes[wire_id] = outbox
        self._emptied.clear()
        if self._paused:
            self._held[wire_id] = Submit(request)
        else:
            self._send(Submit(request))
        return RequestStream(outbox, lambda: self._abort(wire_id))

    def health(self) -> Health:
        """Whether the engine makes progress, as of now."""
        if self._death is not None:
            return Health(False, str(self._death))
        if self._closed:
            return Health(False, "the engine is closed")
        self._channel.drain()  # what has come while this loop was busy counts
        if not self._busy:
            return Health(True, "asleep" if self._asleep else "paused" if self._paused else "idle")
        silent = time.monotonic() - self._progressed
        if silent > self._stuck_after_s:
            waiting = f"{len(self._outboxes)} requests wait"
            return Health(False, f"the engine is stuck: no step finished for {silent:.0f} s, {waiting}")
        return Health(True, "running")

    async def unwell(self) -> str:
        """Wait until the process is dead, or is stuck and was asked for its stacks. Returns what is wrong."""
        await self._unwell.wait()
        return self.health().reason

    @property
    def pid(self) -> int | None:
        """Of the engine process."""
        return None if self._process is None else self._process.pid

    def stats(self) -> dict[str, float]:
        """The engine's counters, at most a quarter of a second old while it works."""
        stats = dict(self._stats)
        if self._held:
            samples = sum(held.request.params.n for held in self._held.values())
            stats["num_waiting"] = stats.get("num_waiting", 0) + samples
        return stats

    async def drain(self, timeout: float) -> int:
        """Take no new requests, let those that run finish for `timeout` seconds, abort the others; how many those
        were."""
        self._refusal = self._refusal or EngineClosedError("the engine is draining and takes no new requests")
        return await self._empty(timeout)

    async def sleep(self, level: int = 1, timeout: float = SLEEP_AFTER_S) -> int:
        """Give back the memory of the KV cache and forget its prefixes; weights stay. Nothing new where it sleeps.

        From now on requests are refused with EngineAsleepError. Those under way may finish within `timeout` seconds,
        the others are aborted; how many those were. Raises UnsupportedError for another level, and where a device has
        no way (it is awake again then); DeviceError; EngineClosedError; EngineDeadError.
        """
        check_level(level)
        async with self._one_change:
            self._check_open()
            was_asleep, self._asleep = self._asleep, True
            try:
                aborted = await self._empty(timeout)
                self._check_open()
            except BaseException:
                self._asleep = was_asleep
                raise
            await self._ask(Sleep(level))
            return aborted

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take the memory again, and requests. tags: see `LLM.wake_up`.

        Raises ParameterError for an unknown tag; MemoryLimitError where others have the memory by now, after which it
        goes on sleeping; EngineClosedError; EngineDeadError.
        """
        if not wakes_cache(tags):
            return
        async with self._one_change:
            self._check_open()
            if self._asleep:
                await self._ask(Wake())

    def is_sleeping(self) -> bool:
        """Whether it takes no requests before `wake_up`."""
        return self._asleep

    def step_times(self) -> list[float]:
        """`Histogram.state` of the engine's steps over STEP_BOUNDS, as old as `stats`; empty before the first."""
        return self._step_times

    def pause(self) -> None:
        """Requests that come from now on wait, in order, until `resume`; those before go on. `sleep`, `drain` and
        `close` do not wait for them: they are aborted. Raises EngineClosedError; EngineDeadError."""
        self._check_open()
        self._paused = True

    def resume(self) -> None:
        """Hand the engine what waited, and what comes. Raises EngineClosedError; EngineDeadError."""
        self._check_open()
        self._paused = False
        held, self._held = self._held, {}
        for wire_id, submit in held.items():
            self._note_queue(wire_id, time.perf_counter() - self._outboxes[wire_id].output.metrics.arrival_time)
            self._send(submit)

    def is_paused(self) -> bool:
        """Whether new requests wait before `resume`."""
        return self._paused

    async def reset_prefix_cache(self) -> None:
        """Forget every prefix. Raises EngineBusyError while the engine has a request; EngineClosedError;
        EngineDeadError."""
        async with self._one_change:
            self._check_open()
            await self._ask(Forget())

    async def profile(self, num_steps: int, timeout: float) -> list[Span]:
        """Phases of the next `num_steps` steps, or of as many as there are within `timeout` seconds.

        Raises EngineBusyError while another one is made; EngineClosedError; EngineDeadError.
        """
        self._check_open()
        if any(not profile.done() for profile in self._profiles):
            raise EngineBusyError("1 profile is being made: wait for it")
        answer: asyncio.Future[list[Span]] = asyncio.get_running_loop().create_future()
        self._profiles.append(answer)
        self._send(Profile(num_steps))
        try:
            await asyncio.wait({answer}, timeout=timeout)
            if not answer.done():
                self._send(Profile(0))
            return await answer
        except asyncio.CancelledError:
            answer.cancel()
            self._send(Profile(0))
            raise

    async def close(self, timeout: float = CLOSE_S) -> None:
        """End every stream with EngineClosedError, and the process, which is killed after `timeout` seconds, or at once
        when it is stuck. May be called again."""
        await self._end(timeout if self.health().ok else 0)

    async def kill(self, reason: str) -> None:
        """End every stream with an EngineDeadError that says `reason`, and the process without waiting for it."""
        self._die(EngineDeadError(reason))
        await self._end(timeout=0)

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)

    async def _empty(self, timeout: float) -> int:
        """Let requests finish for `timeout` seconds and abort the others; how many those were."""
        held = list(self._held)
        for wire_id in held:
            self._abort(wire_id)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._emptied.wait(), timeout)
        left = list(self._outboxes)
        for wire_id in left:
            self._abort(wire_id)
        return len(held) + len(left)

    async def _ask(self, change: Sleep | Wake | Forget) -> None:
        """Send, and wait for the answer. Who stops waiting changes nothing: `_asleep` follows the engine."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes.append(answer)
        self._send(change)
        await answer

    async def _end(self, timeout: float) -> None:
        closed = EngineClosedError("the engine is closed")
        self._closed = True
        self._refusal = self._death or closed
        self._fail_all(closed)
        self._ready.cancel()
        if self._process is not None:
            self._channel.send(Stop())
            await self._process.end(timeout)
        for watcher in self._watchers:
            watcher.cancel()
        self._channel.close()

    @property
    def _busy(self) -> bool:
        return self._idle_after != self._num_sent

    def _send(self, message: Submit | Abort | Sleep | Wake | Forget | Profile) -> None:
        if not self._busy:
            self._progressed = time.monotonic()
        self._num_sent += 1
        self._channel.send(message)

    def _receive(self, message: FromEngine) -> None:
        if not isinstance(message, Step):
            self._take_answer(message)
            return
        self._idle_after = message.idle_after
        if message.num_steps != self._num_steps:
            self._progressed, self._num_steps = time.monotonic(), message.num_steps
        if message.stats is not None:
            self._stats, self._step_times = message.stats, message.step_times
        for wire_id, seconds in message.started:
            self._note_queue(wire_id, seconds)
        outboxes = self._outboxes
        for update in message.updates:
            outbox = outboxes.get(update.request_id)  # None: aborted meanwhile
            try:
                if outbox is not None and not outbox.push(update):
                    self._deliver(outbox, update)
            except Exception as error:  # one request's text must not cost the others theirs
                self._fail(update.request_id, error)

    def _take_answer(self, message: Loading | Ready | Refused | Changed | Profiled | Failed) -> None:
        if isinstance(message, Refused):
            outbox = self._forget(message.request_id)
            if outbox is not None:
                outbox.fail(message.error.rebuild())
        elif isinstance(message, Changed):
            self._take_change(message)
        elif isinstance(message, Profiled):
            profile = self._profiles.popleft()
            if not profile.done():
                profile.set_result(message.spans)
        elif isinstance(message, Loading):
            if self._report is not None:
                self._report(message.done, message.total)
        elif isinstance(message, Ready):
            if not self._ready.done():
                self._ready.set_result(message.info)
        elif isinstance(message, Failed):
            self._failed.set()
            if self._ready.done():
                self._die(message.error.fatal())
            else:
                self._ready.set_exception(message.error.rebuild())

    def _note_queue(self, wire_id: str, seconds: float) -> None:
        if wire_id in self._outboxes:
            metrics = self._outboxes[wire_id].output.metrics
            metrics.queue_s = (metrics.queue_s or 0.0) + seconds

    def _take_change(self, change: Changed) -> None:
        self._asleep = change.asleep
        waiting = self._changes.popleft()
        if waiting.done():
            return  # cancelled
        if change.error is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(change.error.rebuild())

    def _deliver(self, outbox: Outbox, update: SequenceUpdate) -> None:
        if outbox.take(update):
            self._send(Abort(update.request_id, update.index))
        if outbox.finished:
            self._forget(update.request_id)

    def _fail(self, wire_id: str, error: Exception) -> None:
        outbox = self._forget(wire_id)
        if outbox is not None:
            self._send(Abort(wire_id))
            outbox.fail(error)

    def _abort(self, wire_id: str) -> None:
        outbox = self._forget(wire_id)
        if outbox is not None:
            if self._held.pop(wire_id, None) is None:
                self._send(Abort(wire_id))
            outbox.abort()

    def _forget(self, wire_id: str) -> Outbox | None:
        outbox = self._outboxes.pop(wire_id, None)
        if not self._outboxes:
            self._emptied.set()
        return outbox

    def _fail_all(self, error: TokenSpeedError) -> None:
        for wire_id in list(self._outboxes):
            outbox = self._forget(wire_id)
            if outbox is not None:
                outbox.fail(error)
        self._held.clear()
        answers: list[asyncio.Future[Any]] = [*self._changes, *self._profiles]
        for waiting in answers:
            if not waiting.done():
                waiting.set_exception(error)

    def _die(self, error: EngineDeadError) -> None:
        if self._death is not None or self._closed:
            return
        self._death = self._refusal = error
        self._unwell.set()
        if not self._ready.done():
            self._ready.set_exception(error)
        self._fail_all(error)

    async def _watch_process(self, process: EngineProcess) -> None:
        status = await process.wait()
        if status == FAILED:  # it says why before it ends, and the socket may be slower than the news of its end
            with suppress(TimeoutError):
                await asyncio.wait_for(self._failed.wait(), _LAST_WORDS_S)
        self._channel.drain()
        self._channel.close()
        self._die(EngineDeadError(f"the engine process {exit_text(status)}"))

    async def _watch_progress(self, process: EngineProcess) -> None:
        told = False
        while True:
            await asyncio.sleep(min(1.0, self._stuck_after_s / 4))
            ok, reason = self.health()
            if self._death is not None or self._closed:
                return
            if not ok and not told:
                logger.error("%s; the stacks of its threads follow", reason)
                process.dump_stacks()
                await asyncio.sleep(_STACKS_S)
                if not self.health().ok:
                    self._unwell.set()
            told = not ok
