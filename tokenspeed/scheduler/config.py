"""The limits of a step."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.contracts.errors import ConfigError


@dataclass(frozen=True)
class SchedulerConfig:
    """Raises ConfigError on a value out of range.

    max_num_seqs: most sequences at once. max_num_batched_tokens: most tokens fed per step, by all of them.
    max_model_len: most tokens of one sequence, prompt and output.
    long_prefill_token_threshold: most tokens fed per step by one sequence, 0 for no such limit.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    long_prefill_token_threshold: int = 0

    def __post_init__(self) -> None:
        _check_least("max_num_seqs", self.max_num_seqs, 1)
        _check_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _check_least("max_model_len", self.max_model_len, 2)
        _check_least("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)

    @property
    def max_chunk(self) -> int:
        """Most tokens one sequence is fed in one step."""
        return min(self.max_num_batched_tokens, self.long_prefill_token_threshold or self.max_num_batched_tokens)


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
