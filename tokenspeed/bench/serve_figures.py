"""What the requests of a load come to: distributions, the parts of a load, and how arrivals were kept up with."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from tokenspeed.bench.measured import Measured
from tokenspeed.bench.serve import Part


class Distribution(msgspec.Struct, frozen=True):
    """Milliseconds. Percentiles interpolate between neighbours."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class PartFigures(msgspec.Struct, frozen=True):
    """Requests of a load that belong together. input_tokens: of a prompt, in the mean; None without requests.

    cached_share: the part of their input that the server took from its cache; None where it does not say.
    """

    name: str
    requests: int
    input_tokens: float | None
    cached_share: float | None
    ttft_ms: Distribution | None
    itl_ms: Distribution | None


class Arrivals(msgspec.Struct, frozen=True):
    """Requests that were due at times, whatever became of those before.

    under_way: how many were due and had not ended, when half of all were due and when the last one was: more and more
    of them are an overload. waited: how many were held back by --max-concurrency; wait_ms is over all.
    """

    due_per_s: float | None
    under_way_at_half: int
    under_way_at_last: int
    most_under_way: int
    waited: int
    wait_ms: Distribution | None


def distribution(seconds: Sequence[float]) -> Distribution | None:
    """In milliseconds; None of nothing."""
    if not seconds:
        return None
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99)) * 1e3
    return Distribution(1e3 * float(np.mean(seconds)), float(p50), float(p90), float(p99), 1e3 * max(seconds))


def part_figures(part: Part) -> PartFigures:
    """Of the requests in a part that did not fail."""
    good = [request for request in part.requests if request.error is None]
    prompts = sum(request.prompt_tokens for request in good)
    cached = sum(request.cached_tokens for request in good)
    told = prompts > 0 and any(request.tells_cached for request in good)
    return PartFigures(
        name=part.name,
        requests=len(part.requests),
        input_tokens=prompts / len(good) if good else None,
        cached_share=cached / prompts if told else None,
        ttft_ms=distribution([request.ttft for request in good]),
        itl_ms=distribution(part.gaps),
    )


def arrivals(requests: Sequence[Measured]) -> Arrivals | None:
    """Of the requests that were due at some time; None without any."""
    spans = sorted((request.due, request.ended, request.waited) for request in requests if request.due is not None)
    if not spans:
        return None
    due, ended = [span[0] for span in spans], np.sort([span[1] for span in spans])
    # How many there are when each is due, itself included.
    under_way = [place - int(np.searchsorted(ended, at, "right")) for place, at in enumerate(due, start=1)]
    waits = [waited for _, _, waited in spans]
    return Arrivals(
        due_per_s=(len(due) - 1) / (due[-1] - due[0]) if due[-1] > due[0] else None,
        under_way_at_half=under_way[(len(due) - 1) // 2],
        under_way_at_last=under_way[-1],
        most_under_way=max(under_way),
        waited=sum(waited > 0 for waited in waits),
        wait_ms=distribution(waits) if any(waits) else None,
    )
