"""The share that decode steps reach of what the memory can give, while an engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from tokenspeed.ops.definitions import Cost, Workload
from tokenspeed.runner.model import LoadedModel

_CONTEXT_STEP = 256
"""Floors are worked out for contexts of so many tokens and their multiples: walking a program takes its time."""


def step_bytes(
    model: LoadedModel, weight_bytes: Mapping[str, float], kv_bytes: float, batch: int, context: int
) -> float:
    """Bytes that a decode step of `batch` sequences of `context` tokens moves. kv_bytes: per element of the KV."""
    work = Workload(batch, batch, batch, max(1, context), model.dtype.itemsize, kv_bytes, weight_bytes)
    return sum((model.program.cost(record, work) for record in model.program.records), Cost()).bytes


class FloorShare:
    """The floor of decode steps, as the weights' own format has it, over the time they took."""

    def __init__(self, model: LoadedModel, kv_bytes: float, read_gbs: float) -> None:
        """read_gbs: what the memory gives, GB/s."""
        self._rate = 1e9 * read_gbs
        self._bytes = lru_cache(lambda batch, context: step_bytes(model, model.file_bytes, kv_bytes, batch, context))
        self._seen = (0, 0, 0.0)
        self._context = 1
        self.share: float | None = None
        """Of the steps between the last two updates that had some; None before."""

    def update(self, steps: int, tokens: int, seconds: float, context: int) -> None:
        """Totals of decode steps, and the mean context of what runs now, 0 where nothing does."""
        before, self._seen = self._seen, (steps, tokens, seconds)
        self._context = context or self._context
        new_steps, new_tokens, took = steps - before[0], tokens - before[1], seconds - before[2]
        if new_steps > 0 and took > 0:
            batch = max(1, round(new_tokens / new_steps))
            context = _CONTEXT_STEP * max(1, round(self._context / _CONTEXT_STEP))
            self.share = new_steps * self._bytes(batch, context) / self._rate / took
