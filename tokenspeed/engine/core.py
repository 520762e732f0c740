"""The step loop: schedule, launch, update. It knows requests and updates, and nothing of text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ParameterError, PromptError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.step import ResultRow, StepPlan, StepResult
from tokenspeed.runner.build import ModelFiles, build_executor
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler


@dataclass
class StepClock:
    """Time of steps that only fed prompts, and of those that only decoded; mixed steps are in neither."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0

    def add(self, fed: list[int], sampled: int, seconds: float) -> None:
        """One step: tokens fed per row, tokens sampled, wall seconds."""
        if all(count == 1 for count in fed) and sampled == len(fed):
            self.decode_tokens += sampled
            self.decode_steps += 1
            self.decode_s += seconds
        elif not any(count == 1 for count in fed):
            self.prefill_tokens += sum(fed)
            self.prefill_s += seconds


@dataclass
class EngineCore:
    """One model, one scheduler, one executor."""

    config: EngineConfig
    files: ModelFiles
    progress: Callable[[int, int], None] | None = None
    clock: StepClock = field(default_factory=StepClock)

    def __post_init__(self) -> None:
        built = build_executor(self.files, self.config, self.progress)
        self.executor, self.model = built.executor, built.model
        self.max_model_len, self.kv_dtype, self.num_pages = built.max_model_len, built.kv_dtype, built.num_pages
        root = root_key(self.files.digest, f"{built.kv_dtype} {built.model.dtype}", self.config.block_size)
        self.cache = CacheManager(
            built.num_pages, self.config.block_size, root, enable_prefix_caching=self.config.enable_prefix_caching
        )
        limits = SchedulerConfig(self.config.max_num_seqs, self.config.max_num_batched_tokens, self.max_model_len)
        self.scheduler = Scheduler(limits, self.cache)
        self.vocab_size = self.files.definition.config.vocab_size
        self._alive: set[str] = set()

    def check(self, request: Request) -> None:
        """Raise PromptError or ParameterError for ids that are not in the vocabulary."""
        for token in request.prompt_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise PromptError(f"prompt token id {token!r} is not in the vocabulary (0 to {self.vocab_size - 1})")
        for token in request.params.stop_token_ids:
            if token >= self.vocab_size:
                raise ParameterError(f"stop token id {token} is not in the vocabulary (0 to {self.vocab_size - 1})")

    def add(self, request: Request) -> None:
        """Queue a request; a refused one leaves no trace."""
        self.check(request)
        self.scheduler.add(request)
        self._alive.add(request.request_id)

    def abort(self, request_id: str) -> SequenceUpdate | None:
        """End a request now."""
        self._alive.discard(request_id)
        return self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.has_work

    def step(self) -> list[SequenceUpdate]:
        """One step; what it brought for each request. When it raises, or is interrupted, every request is gone."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        try:
            result = self.executor.launch(plan).result()
        except BaseException:
            self._drop_all(plan)
            raise
        updates = self.scheduler.update(result)
        self._alive.difference_update(update.request_id for update in updates if update.finish_reason is not None)
        sampled = sum(len(row.token_ids) for row in result.rows)
        self.clock.add([row.num_fed for row in result.rows], sampled, time.perf_counter() - started)
        return updates

    def _drop_all(self, failed: StepPlan) -> None:
        """End every request: how far the failed step came is not known, so nothing may build on it."""
        for request_id in tuple(self._alive):
            self.abort(request_id)
        self.scheduler.update(StepResult(failed.step_id, [ResultRow(row.slot, 0, []) for row in failed.rows]))

    def close(self) -> None:
        """Release the executor."""
        self.executor.close()
