"""The step loop: schedule, launch, update. It knows requests and updates, and nothing of text.

`python -m tokenspeed.engine.core` is the engine in a process of its own; see `engine.loop`.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from tokenspeed.cache.groups import GroupSpec
from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import (
    EngineBusyError,
    EngineClosedError,
    LogitsProcessorError,
    ParameterError,
    PromptError,
    UnsupportedError,
)
from tokenspeed.contracts.executor import Executor, StepHandle
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.step import ResultRow, StepPlan, StepResult
from tokenspeed.engine.capacity import Capacity, fit_capacity
from tokenspeed.engine.decode_floor import decode_floor
from tokenspeed.engine.floor import FloorShare
from tokenspeed.engine.messages import EngineInfo
from tokenspeed.engine.sleep import asleep_error, check_level
from tokenspeed.engine.trace import StepTrace
from tokenspeed.observability.ceilings import read_ceilings
from tokenspeed.observability.metrics import STEP_BOUNDS, Histogram
from tokenspeed.runner.build import ModelFiles, Prepared, open_model, prepare
from tokenspeed.runner.processors import ProcessingExecutor
from tokenspeed.runner.room import Room
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.records import StepRecord
from tokenspeed.scheduler.scheduler import Scheduler

RING = 1024
"""Steps that are remembered."""


@dataclass
class StepClock:
    """Time of steps that only fed prompts, and of those that only decoded; mixed steps are in neither."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0

    def add_decode(self, sampled: int, num_passes: int, seconds: float) -> None:
        """A step that only decoded: tokens sampled, runs through the model, wall seconds."""
        self.decode_tokens += sampled
        self.decode_steps += num_passes
        self.decode_s += seconds

    def add_prefill(self, fed: int, seconds: float) -> None:
        """A step that only fed prompts."""
        self.prefill_tokens += fed
        self.prefill_s += seconds


@dataclass(frozen=True)
class TimedStep:
    """A retired step: what was planned, tokens sampled, seconds since the step before retired (or since it was
    launched, where that is shorter)."""

    record: StepRecord
    num_sampled: int
    seconds: float


@dataclass(frozen=True)
class _InFlight:
    plan: StepPlan
    record: StepRecord
    handle: StepHandle
    launched: float


class StepLoop:
    """A scheduler and an executor. Keeps up to `executor.max_in_flight` steps under way."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = StepClock()
        self.ring: deque[TimedStep] = deque(maxlen=RING)
        self.num_steps = 0
        """Retired since the start."""
        self.trace: StepTrace | None = None
        """Where the phases of steps are noted, when somebody asked for them."""
        self._in_flight: deque[_InFlight] = deque()
        self._retired = 0.0
        self.step_times = Histogram(STEP_BOUNDS)
        self.started: list[tuple[str, float]] = []
        """Requests that the last `step` fed for the first time, and the seconds they had waited."""
        self._queued: dict[str, float] = {}
        """When requests came that were never fed yet."""
        self._idle_s = 0.0
        self._device_waits = False
        """Since the last step retired, with work left and nothing under way."""
        self._asleep = self._closed = False

    def add(self, request: Request) -> None:
        """Queue a request; a refused one leaves no trace. Raises EngineAsleepError, and EngineClosedError."""
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if self._asleep:
            raise asleep_error()
        if not self.scheduler.has_work:
            self._device_waits = False  # there was nothing to do in between
        self.scheduler.add(request)
        self._queued[request.request_id] = time.perf_counter()

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceUpdate]:
        """End a request, or one of its sequences, now."""
        updates = self.scheduler.abort(request_id, index)
        if request_id in self._queued and not self.scheduler.is_alive(request_id):
            del self._queued[request_id]
        return updates

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or a step is in flight."""
        return bool(self._in_flight) or self.scheduler.has_work

    def step(self) -> list[SequenceUpdate]:
        """Launch what fits, then wait for the oldest step; what it brought.

        When it raises, or is interrupted, every request is gone: how far the step came is not known, so nothing may
        build on it.
        """
        self.started = []
        try:
            self._launch()
            if not self._in_flight:
                return []
            oldest, began = self._in_flight[0], time.perf_counter()
            result = oldest.handle.result()
            collected = time.perf_counter()
        except BaseException:
            self._drop_all()
            raise
        self._in_flight.popleft()
        self.num_steps += 1
        self._time(oldest, result)
        updates = self.scheduler.update(result)
        self._device_waits = not self._in_flight and self.scheduler.has_work
        if self.trace is not None:
            self.trace.add("collect", began, collected, oldest.plan.step_id, oldest.record.num_tokens)
            self.trace.add("update", collected, time.perf_counter(), oldest.plan.step_id, oldest.record.num_tokens)
        return updates

    @property
    def asleep(self) -> bool:
        """Whether it sleeps, or tried to and did not come far enough to be used without `wake`."""
        return self._asleep

    def sleep(self, level: int = 1) -> None:
        """Give back the memory of the KV cache, whose prefixes are forgotten; weights stay. May be called again.

        Raises UnsupportedError for another level, EngineBusyError while a request is alive, DeviceError; after that
        last one both `sleep` and `wake` may be tried.
        """
        check_level(level)
        self._forget_prefixes("the engine sleeps")
        self._asleep = True
        try:
            self.executor.sleep()
        except UnsupportedError:
            self._asleep = False
            raise

    def forget_prefixes(self) -> None:
        """Drop the prefixes that the cache holds. Raises EngineBusyError while a request is alive."""
        self._forget_prefixes("the prefix cache is reset")

    def wake(self) -> None:
        """Take the memory again. Raises MemoryLimitError where others have it by now; it goes on sleeping then."""
        self.executor.wake()
        self._asleep = False

    def close(self) -> None:
        """Release the executor. It takes no requests any more."""
        self._closed = True
        self.executor.close()

    @property
    def idle_s(self) -> float | None:
        """Seconds in which the device had work to do and no step under way; None where the host cannot see it."""
        return self._idle_s if self.executor.max_in_flight == 1 else None

    def _forget_prefixes(self, purpose: str) -> None:
        if self.scheduler.has_work:
            raise EngineBusyError(
                f"{self.scheduler.num_requests} requests are under way: finish or abort them before {purpose}"
            )
        while self._in_flight:  # steps of requests that were aborted
            self.step()
        self.scheduler.forget_prefixes()

    def _launch(self) -> None:
        while len(self._in_flight) < self.executor.max_in_flight:
            began = time.perf_counter()
            plan = self.scheduler.schedule()
            if plan is None:
                return
            record, started = self.scheduler.record, time.perf_counter()
            if self._device_waits:
                self._idle_s += started - self._retired
                self._device_waits = False
            if self._queued:
                self._note_started(record, started)
            # Counts as in flight even while the launch raises: the scheduler waits for its result.
            self._in_flight.append(_InFlight(plan, record, _Unfinished(), started))
            self._in_flight[-1] = _InFlight(plan, record, self.executor.launch(plan), started)
            if self.trace is not None:
                self.trace.add("schedule", began, started, plan.step_id, record.num_tokens)
                self.trace.add("launch", started, time.perf_counter(), plan.step_id, record.num_tokens)

    def _note_started(self, record: StepRecord, now: float) -> None:
        for request_id in record.request_ids:
            came = self._queued.pop(request_id, None)
            if came is not None:
                self.started.append((request_id, now - came))

    def _time(self, step: _InFlight, result: StepResult) -> None:
        now = time.perf_counter()
        seconds = now - max(step.launched, self._retired)
        self._retired = now
        self.step_times.observe(seconds)
        record = step.record
        sampled = sum(len(row.token_ids) for row in result.rows)
        self.ring.append(TimedStep(record, sampled, seconds))
        if not record.num_prefill_tokens and sampled:
            self.clock.add_decode(sampled, result.num_passes, seconds)
            self.scheduler.observe_decode(sampled, result.num_passes, seconds)
            return
        self.scheduler.observe(record.num_tokens, seconds)
        if record.num_prefill_tokens == record.num_tokens > len(step.plan.rows):
            self.clock.add_prefill(record.num_tokens, seconds)

    def _drop_all(self) -> None:
        for request_id in self.scheduler.request_ids:
            self.abort(request_id)
        while self._in_flight:
            plan = self._in_flight.popleft().plan
            self.scheduler.update(StepResult(plan.step_id, [ResultRow(row.slot, 0, []) for row in plan.rows]))


class _Unfinished:
    def result(self) -> StepResult:
        raise RuntimeError("this step was never launched")


class EngineCore(StepLoop):
    """One model with its own executor, cache and scheduler."""

    def __init__(
        self, config: EngineConfig, files: ModelFiles, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Load the model and size the KV cache. Raises the errors of `contracts.errors`."""
        self.config, self.files = config, files
        prepared = prepare(files, config, progress)
        self.loaded_at = {"weights": time.monotonic()}
        """Monotonic seconds at which each part of loading ended."""
        self.model, self.backend, self.page_shape = prepared.model, prepared.backend, prepared.shape
        groups = tuple(GroupSpec(window) for window in prepared.shape.layout.windows)
        context = files.definition.config.context
        longest = _capacity(prepared, prepared.room, groups, context).max_model_len
        self.capacity = _capacity(prepared, prepared.measured(longest), groups, context)
        self.loaded_at["measuring"] = time.monotonic()
        self.cache = CacheManager(
            self.capacity.num_pages,
            config.block_size,
            _root(files, prepared, config),
            groups,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        limits = SchedulerConfig(
            config.max_num_seqs,
            config.step_tokens(prepared.model.device.type),
            self.capacity.max_model_len,
            max_passes=prepared.backend.max_passes,
            target_itl_ms=config.target_itl_ms,
        )
        executor = _executor(prepared, self.capacity, config)
        super().__init__(Scheduler(limits, self.cache), executor)
        self._processors = executor.processors
        self.failed: list[tuple[str, LogitsProcessorError]] = []
        """Requests that the last `step` ended because a logits processor failed: what it says of them is worth
        nothing."""
        self.vocab_size = files.definition.config.vocab_size
        ceilings = read_ceilings() if prepared.model.device.type == "cpu" else None
        self._floor = FloorShare(self.model, self.page_shape.element_bytes, ceilings.read_gbs) if ceilings else None

    @property
    def kv_dtype(self) -> torch.dtype:
        """Type of the KV cache."""
        return self.page_shape.dtype

    @property
    def info(self) -> EngineInfo:
        """What others have to know of the model."""
        tokenizer = self.files.tokenizer
        return EngineInfo(
            model=self.files.name,
            path=str(tokenizer.path) if tokenizer else None,
            format=tokenizer.format if tokenizer else None,
            max_model_len=self.capacity.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=list(self.files.generation.eos_token_ids),
            sampling_defaults=dict(self.files.generation.sampling),
            max_num_seqs=self.config.max_num_seqs,
            num_pages=self.capacity.num_pages,
            block_size=self.config.block_size,
            fallback_ops=list(self.backend.fallback_ops),
            hidden_size=self.files.definition.config.hidden_size,
            num_labels=self.files.definition.config.num_labels,
            headless=self.files.definition.config.headless,
            decode_floor=decode_floor(
                self.model, self.backend.weight_bytes, self.page_shape, self.capacity.max_model_len
            ),
        )

    def add(self, request: Request) -> None:
        """Queue a request. Raises PromptError or ParameterError for ids that are not in the vocabulary."""
        for token in request.prompt_token_ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise PromptError(f"prompt token id {token!r} is not in the vocabulary (0 to {self.vocab_size - 1})")
        pooled = {} if request.pooling is None else {"token_ids": request.pooling.token_ids}
        for name, ids in (request.params.token_ids() | pooled).items():
            for token in ids:
                if token >= self.vocab_size:
                    raise ParameterError(
                        f"{name}: token id {token} is not in the vocabulary (0 to {self.vocab_size - 1})"
                    )
        super().add(request)
        if request.params.logits_processors:
            request.processors = self._processors.add(request.request_id, request.params.logits_processors)

    def step(self) -> list[SequenceUpdate]:
        """As a `StepLoop` does. `failed` tells which requests it ended early."""
        self.failed = []
        updates = super().step()
        if self._processors:
            self.failed = self._processors.take_failures()
            for request_id, _ in self.failed:
                self.abort(request_id)
            for update in updates:
                self._drop_processors(update.request_id)
        return updates

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceUpdate]:
        """End a request, or one of its sequences, now."""
        updates = super().abort(request_id, index)
        self._drop_processors(request_id)
        return updates

    def _drop_processors(self, request_id: str) -> None:
        if self._processors and not self.scheduler.is_alive(request_id):
            self._processors.drop(request_id)

    def stats(self) -> dict[str, float]:
        """Counters and gauges by name; floor_share and device_idle_s only where they are known."""
        found = self.scheduler.stats()
        stats = {name: float(value) for name, value in msgspec.structs.asdict(found).items()}
        if self.idle_s is not None:
            stats["device_idle_s"] = self.idle_s
        if self._floor is not None:
            clock, tokens = self.clock, found.pages_held * self.config.block_size / len(self.cache.groups)
            context = round(tokens / found.num_running) if found.num_running else 0
            self._floor.update(clock.decode_steps, clock.decode_tokens, clock.decode_s, context)
            if self._floor.share is not None:
                stats["floor_share"] = self._floor.share
        return stats


def _capacity(prepared: Prepared, room: Room, groups: tuple[GroupSpec, ...], context: int) -> Capacity:
    config = prepared.config
    return fit_capacity(
        groups,
        config.block_size,
        prepared.shape.page_bytes,
        cache_bytes=room.cache_bytes,
        free_bytes=room.free_bytes,
        asked_len=config.max_model_len,
        context=context,
        max_num_seqs=config.max_num_seqs,
        flag=room.flag,
    )


def _executor(prepared: Prepared, capacity: Capacity, config: EngineConfig) -> ProcessingExecutor:
    return prepared.executor(capacity.num_pages, config.max_num_seqs, capacity.max_model_len)


def _root(files: ModelFiles, prepared: Prepared, config: EngineConfig) -> bytes:
    weights = files.digest if config.quantization is None else f"{files.digest} {config.quantization}"
    weights += " batch-invariant" if config.batch_invariant else ""
    weights += " long" if files.definition.config.stretched else ""
    scales = [f"{layer} {scale.key!r} {scale.value!r}" for layer, scale in sorted(prepared.model.kv_scales.items())]
    pages = ", ".join([f"{prepared.shape.dtype} {prepared.model.dtype}", *scales])
    return root_key(weights, pages, config.block_size)


def build(config: EngineConfig, progress: Callable[[int, int], None]) -> tuple[EngineCore, EngineInfo]:
    """Open and load a model."""
    core = EngineCore(config, open_model(config), progress)
    return core, core.info


if __name__ == "__main__":
    from tokenspeed.engine.loop import run

    sys.exit(run(build))
