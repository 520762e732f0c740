"""One request that has ended: what the log's line and the spans are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenspeed.server.client import NOBODY, Caller


@dataclass
class RequestSummary:
    """Times in seconds; None where it did not come so far. Tokens of all samples."""

    request_id: str
    prompt_token_ids: list[int] = field(repr=False)
    samples: int
    caller: Caller = NOBODY
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_s: float | None = None
    """Until the engine fed it."""
    ttft_s: float | None = None
    """Until its first token, from its arrival on."""
    tpot_s: float | None = None
    """Mean of its samples, per token after the first."""
    total_s: float = 0.0
    finish_reasons: list[str] = field(default_factory=list)
    """In the order in which its samples ended."""
