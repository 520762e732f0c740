"""The limits of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokenspeed.contracts.errors import ConfigError


@dataclass(frozen=True)
class SchedulerConfig:
    """Raises ConfigError on a value out of range.

    max_num_seqs: most sequences at once. max_num_batched_tokens: most tokens fed per step, by all of them.
    max_model_len: most tokens of one sequence, prompt and output.
    long_prefill_token_threshold: most prompt tokens fed per step by one sequence, 0 for no such limit.
    max_draft_tokens: tokens a decoding row may feed beside the one it knows.
    max_passes: decode passes that the executor can run in one step.
    target_itl_ms: while something decodes, prompts are fed in chunks that keep a step within this time; None feeds them
    as fast as max_num_batched_tokens allows.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    long_prefill_token_threshold: int = 0
    max_draft_tokens: int = 0
    max_passes: int = 1
    target_itl_ms: float | None = None

    def __post_init__(self) -> None:
        _check_least("max_num_seqs", self.max_num_seqs, 1)
        _check_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _check_least("max_model_len", self.max_model_len, 2)
        _check_least("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        _check_least("max_draft_tokens", self.max_draft_tokens, 0)
        _check_least("max_passes", self.max_passes, 1)
        if self.target_itl_ms is not None and not (math.isfinite(self.target_itl_ms) and self.target_itl_ms > 0):
            raise ConfigError(f"target_itl_ms must be a positive number of milliseconds, got {self.target_itl_ms}")

    @property
    def max_chunk(self) -> int:
        """Most prompt tokens one sequence is fed in one step."""
        return min(self.max_num_batched_tokens, self.long_prefill_token_threshold or self.max_num_batched_tokens)

    @property
    def max_running(self) -> int:
        """Most sequences at once: each must find a token in the budget."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
