"""An executor that says what it was told to: for testing parsers, servers and clients without a model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from tokenspeed.contracts.step import NewSequence, Pooling, ResultRow, StepPlan, StepResult, TokenLogprobs
from tokenspeed.runner.null import made_up

Key = tuple[tuple[int, ...], int, int]


@dataclass(slots=True)
class _Slot:
    key: Key
    script: list[int]
    num_prompt: int
    token_ids: list[int]
    num_computed: int
    logprobs: bool
    prompt_logprobs: bool
    pooling: Pooling | None


@dataclass(frozen=True, slots=True)
class Delayed:
    """The handle of a step that is over at a moment of `time.monotonic`."""

    step: StepResult
    ready_at: float

    def result(self) -> StepResult:
        """Wait for that moment."""
        if (wait := self.ready_at - time.monotonic()) > 0:
            time.sleep(wait)
        return self.step


class ScriptedExecutor:
    """Gives each new sequence the next script, in the order in which they enter, and then `end_token_id` for ever.

    A sequence is known by its prompt, seed and sample index, so one that was preempted goes on where it was. Requested
    log-probabilities are all -1, without alternatives; what is pooled is as by `NullExecutor`. Each step takes
    `delay_s` seconds, one after the other.
    """

    max_in_flight = 1

    def __init__(self, scripts: Iterable[Iterable[int]], end_token_id: int, delay_s: float = 0.0) -> None:
        self._scripts = [list(script) for script in scripts]
        self._end_token_id = end_token_id
        self._delay_s = delay_s
        self._ready_at = 0.0
        self._slots: dict[int, _Slot] = {}
        self._given: dict[Key, list[int]] = {}

    def launch(self, plan: StepPlan) -> Delayed:
        """Compute the result now, and let it be ready when its time has come."""
        for slot in plan.delta.freed:
            del self._slots[slot]
        for new in plan.delta.new:
            self._slots[new.slot] = self._enter(new)
        rows = [self._run(row.slot, self._slots[row.slot], row.max_tokens) for row in plan.rows]
        self._ready_at = max(self._ready_at, time.monotonic()) + self._delay_s
        return Delayed(StepResult(plan.step_id, rows), self._ready_at)

    def sleep(self) -> None:
        """Nothing to give back: there are no pages."""

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Forget the sequences."""
        self._slots.clear()

    def _enter(self, new: NewSequence) -> _Slot:
        sampling = new.sampling
        key = (tuple(new.token_ids[: new.num_prompt]), sampling.seed, sampling.sample_index)
        if new.pooling is not None:  # it says nothing
            return _Slot(key, [], new.num_prompt, list(new.token_ids), new.num_computed, False, False, new.pooling)
        running = any(slot.key == key for slot in self._slots.values())
        if running or key not in self._given:
            self._given[key] = self._scripts.pop(0) if self._scripts else []
        return _Slot(
            key,
            self._given[key],
            new.num_prompt,
            list(new.token_ids),
            new.num_computed,
            sampling.logprobs >= 0,
            sampling.prompt_logprobs >= 0,
            None,
        )

    def _run(self, number: int, slot: _Slot, max_tokens: int) -> ResultRow:
        start, length = slot.num_computed, len(slot.token_ids)
        end = slot.num_computed = min(start + max_tokens, length)
        scored = slot.token_ids[start + 1 : min(end + 1, slot.num_prompt)] if slot.prompt_logprobs else []
        scores = [_logprob(token) for token in scored]
        if end < length:
            return ResultRow(number, end, [], [], scores)
        if slot.pooling is not None:
            return ResultRow(number, end, [], pooled=made_up(slot.pooling))
        index = length - slot.num_prompt
        token = slot.script[index] if index < len(slot.script) else self._end_token_id
        slot.token_ids.append(token)
        return ResultRow(number, end, [token], [_logprob(token)] if slot.logprobs else [], scores)


def _logprob(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -1.0, 1, [], [])
