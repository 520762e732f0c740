"""A request as the engine takes it, and what it says back about it each step."""

from __future__ import annotations

import msgspec

from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import Pooling, TokenLogprobs


class Request(msgspec.Struct, kw_only=True):
    """`params.n` sequences to complete from one prompt. `prompt_token_ids` is not empty; `params` holds final values
    (defaults already applied)."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    """The sampler's key: the request's own seed, or one drawn for it."""
    eos_token_ids: list[int] = []
    cache_salt: str = ""
    """Part of the prefix key: requests of different salts never share pages."""
    priority: int = 0
    """Lower runs earlier; waiting makes up for it in time."""
    processors: int = 0
    """The number that the engine gave to `params.logits_processors`, 0 for none."""
    pooling: Pooling | None = None
    """What it wants in place of tokens: then there is one sequence, which ends with its prompt and never samples."""


class SequenceUpdate(msgspec.Struct, kw_only=True, array_like=True, gc=False):
    """What one step brought for one sequence of a request."""

    request_id: str
    index: int = 0
    """Which of the request's n samples."""
    new_token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    """Of prompt positions 1.. in order, as chunks of the prompt are computed; reported with index 0 only."""
    finish_reason: str | None = None
    """None while it runs; "stop" (eos or a stop id), "length", "abort"; "error" where a logits processor failed."""
    stop_reason: int | None = None
    """The stop id that ended it, when that was not an eos."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    pooled: bytes = b""
    """As of ResultRow; it ends the sequence, with "stop"."""
