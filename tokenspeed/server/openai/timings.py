"""`timings` of a response: where its time went, and how close decoding came to the limit of the machine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from tokenspeed.engine.output import RequestMetrics
from tokenspeed.server.engine import Info
from tokenspeed.server.openai.responses import Timings


def response_timings(requests: Sequence[tuple[int, int, RequestMetrics]], info: Info) -> Timings:
    """requests: (prompt tokens, cached tokens, metrics) of each prompt, all finished. The times of several prompts are
    each the longest one, cached tokens are summed, and the share is the least."""
    times = [metrics.timings(metrics.num_tokens) for _, _, metrics in requests]
    shares = [
        floor_ms(info.decode_floor, prompt + metrics.num_tokens // 2) / found["tpot_ms"]
        for (prompt, _, metrics), found in zip(requests, times, strict=True)
        if info.decode_floor and found.get("tpot_ms")
    ]
    return Timings(
        queue_ms=_longest(found.get("queue_ms") for found in times),
        prefill_ms=_longest(found.get("prefill_ms") for found in times),
        ttft_ms=_longest(found.get("ttft_ms") for found in times),
        tpot_ms=_longest(found.get("tpot_ms") for found in times),
        cached_tokens=sum(cached for _, cached, _ in requests),
        share_of_floor=min(shares, default=None),
        fallback_ops=list(info.fallback_ops),
    )


def floor_ms(points: Sequence[tuple[int, float]], context: int) -> float:
    """The floor at `context` tokens, on the line between the points beside it; beyond the last, that of the last."""
    at = bisect_left(points, (context, 0.0))
    if at in (0, len(points)):
        return points[min(at, len(points) - 1)][1]
    (low, low_ms), (high, high_ms) = points[at - 1], points[at]
    return low_ms + (high_ms - low_ms) * (context - low) / (high - low)


def _longest(times: Iterable[float | None]) -> float | None:
    return max((time for time in times if time is not None), default=None)
