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
    ParameterError,
    PromptError,
    UnsupportedError,
)
from tokenspeed.contracts.executor import Executor, StepHandle
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.step import ResultRow, StepPlan, StepResult
from tokenspeed.engine.capacity import Capacity, fit_capacity
from tokenspeed.engine.decode_floor import decode_floor
from tokenspeed.engine.messages import EngineInfo
from tokenspeed.engine.sleep import asleep_error, check_level
from tokenspeed.runner.build import ModelFiles, Prepared, open_model, prepare
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
        self._in_flight: deque[_InFlight] = deque()
        self._retired = 0.0
        self._queued: set[str] = set()
        """Requests that no step has named yet."""
        self._launched: dict[str, float] = {}
        """When the first step was launched, of requests without an update."""
        self._asleep = self._closed = False

    def add(self, request: Request) -> None:
        """Queue a request; a refused one leaves no trace. Raises EngineAsleepError, and EngineClosedError."""
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if self._asleep:
            raise asleep_error()
        self.scheduler.add(request)
        self._queued.add(request.request_id)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceUpdate]:
        """End a request, or one of its sequences, now."""
        if index is None:
            self._queued.discard(request_id)
            self._launched.pop(request_id, None)
        return self.scheduler.abort(request_id, index)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or a step is in flight."""
        return bool(self._in_flight) or self.scheduler.has_work

    def step(self) -> list[SequenceUpdate]:
        """Launch what fits, then wait for the oldest step; what it brought.

        When it raises, or is interrupted, every request is gone: how far the step came is not known, so nothing may
        build on it.
        """
        try:
            self._launch()
            if not self._in_flight:
                return []
            oldest = self._in_flight[0]
            result = oldest.handle.result()
        except BaseException:
            self._drop_all()
            raise
        self._in_flight.popleft()
        self.num_steps += 1
        self._time(oldest, result)
        updates = self.scheduler.update(result)
        if self._launched:
            self._tell_launches(updates)
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
        if self.scheduler.has_work:
            raise EngineBusyError(
                f"{self.scheduler.num_requests} requests are under way: finish or abort them before the engine sleeps"
            )
        while self._in_flight:  # steps of requests that were aborted
            self.step()
        self.scheduler.forget_prefixes()
        self._asleep = True
        try:
            self.executor.sleep()
        except UnsupportedError:
            self._asleep = False
            raise

    def wake(self) -> None:
        """Take the memory again. Raises MemoryLimitError where others have it by now; it goes on sleeping then."""
        self.executor.wake()
        self._asleep = False

    def close(self) -> None:
        """Release the executor. It takes no requests any more."""
        self._closed = True
        self.executor.close()

    def _launch(self) -> None:
        while len(self._in_flight) < self.executor.max_in_flight:
            plan = self.scheduler.schedule()
            if plan is None:
                return
            record, started = self.scheduler.record, time.perf_counter()
            if self._queued and record.num_prefill_tokens:
                self._note_launches(record, started)
            # Counts as in flight even while the launch raises: the scheduler waits for its result.
            self._in_flight.append(_InFlight(plan, record, _Unfinished(), started))
            self._in_flight[-1] = _InFlight(plan, record, self.executor.launch(plan), started)

    def _note_launches(self, record: StepRecord, now: float) -> None:
        for request_id in record.request_ids:
            if request_id in self._queued:
                self._queued.remove(request_id)
                self._launched[request_id] = now

    def _tell_launches(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            update.launched = self._launched.pop(update.request_id, None)

    def _time(self, step: _InFlight, result: StepResult) -> None:
        now = time.perf_counter()
        seconds = now - max(step.launched, self._retired)
        self._retired = now
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
            config.max_num_batched_tokens,
            self.capacity.max_model_len,
            max_passes=prepared.backend.max_passes,
            target_itl_ms=config.target_itl_ms,
        )
        super().__init__(Scheduler(limits, self.cache), _executor(prepared, self.capacity, config))
        self.vocab_size = files.definition.config.vocab_size

    @property
    def kv_dtype(self) -> torch.dtype:
        """Type of the KV cache."""
        return self.page_shape.dtype

    @property
    def info(self) -> EngineInfo:
        """What others have to know of the model."""
        source = self.files.source
        return EngineInfo(
            model=self.files.name,
            path=str(source.path) if source else None,
            format=source.format if source else None,
            max_model_len=self.capacity.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=list(self.files.generation.eos_token_ids),
            sampling_defaults=dict(self.files.generation.sampling),
            max_num_seqs=self.config.max_num_seqs,
            num_pages=self.capacity.num_pages,
            block_size=self.config.block_size,
            fallback_ops=list(self.backend.fallback_ops),
            decode_floor=decode_floor(
                self.model, self.backend.weight_bytes, self.page_shape, self.capacity.max_model_len
            ),
        )

    def add(self, request: Request) -> None:
        """Queue a request. Raises PromptError or ParameterError for ids that are not in the vocabulary."""
        for token in request.prompt_token_ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise PromptError(f"prompt token id {token!r} is not in the vocabulary (0 to {self.vocab_size - 1})")
        for name, ids in request.params.token_ids().items():
            for token in ids:
                if token >= self.vocab_size:
                    raise ParameterError(
                        f"{name}: token id {token} is not in the vocabulary (0 to {self.vocab_size - 1})"
                    )
        super().add(request)

    def stats(self) -> dict[str, float]:
        """Counters and gauges by name."""
        return {name: float(value) for name, value in msgspec.structs.asdict(self.scheduler.stats()).items()}


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


def _executor(prepared: Prepared, capacity: Capacity, config: EngineConfig) -> Executor:
    return prepared.executor(capacity.num_pages, config.max_num_seqs, capacity.max_model_len)


def _root(files: ModelFiles, prepared: Prepared, config: EngineConfig) -> bytes:
    weights = files.digest if config.quantization is None else f"{files.digest} {config.quantization}"
    weights += " batch-invariant" if config.batch_invariant else ""
    return root_key(weights, f"{prepared.shape.dtype} {prepared.model.dtype}", config.block_size)


def build(config: EngineConfig, progress: Callable[[int, int], None]) -> tuple[EngineCore, EngineInfo]:
    """Open and load a model."""
    core = EngineCore(config, open_model(config), progress)
    return core, core.info


if __name__ == "__main__":
    from tokenspeed.engine.loop import run

    sys.exit(run(build))
