"""What the step loop can tell of itself: one record per step, and totals."""

from __future__ import annotations

import msgspec


class StepRecord(msgspec.Struct, frozen=True):
    """A step as it was planned."""

    step_id: int
    request_ids: list[str]
    """Of its rows, in order."""
    num_tokens: int
    """The most it may feed."""
    num_prefill_tokens: int
    """Of those, in rows of sequences that do not decode yet."""
    preempted: list[str]
    """Request ids that lost their pages while it was planned."""


class SchedulerStats(msgspec.Struct, frozen=True):
    """A snapshot; counts are of sequences unless said otherwise."""

    num_running: int
    num_waiting: int
    """Those that wait for their fence after preemption are among them."""
    num_steps_in_flight: int
    num_preemptions: int
    """Since the start."""
    pages_total: int
    pages_held: int
    pages_cached: int
    """Pages that a prefix could hit, held or not."""
    pages_available: int
    prefix_queries: int
    """Requests that looked for a prefix, since the start."""
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    budget_used: float
    """Tokens of the last step over max_num_batched_tokens."""
