"""When requests are sent: as many as may be under way, at random times of a rate, or at given times."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from tokenspeed.contracts.errors import ConfigError


@dataclass(frozen=True)
class Load:
    """`concurrency` requests always under way, or `rate` per second, or at `times` (seconds from the start, ascending).
    One of the three.

    burstiness: the shape of the gamma distribution that the gaps of a rate come from. 1 is Poisson, below 1 comes in
    bursts, above 1 is more even; the variance of a gap is 1 / (burstiness * rate^2). As in vLLM's `bench serve`.
    max_concurrency: the most under way at a rate or at times; what is due beyond that waits for a place, in order.
    """

    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0
    max_concurrency: int | None = None
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if [self.concurrency, self.rate, self.times].count(None) != 2:
            raise ConfigError("give one of --concurrency and --rate")
        for flag, places in (("--concurrency", self.concurrency), ("--max-concurrency", self.max_concurrency)):
            if places is not None and places < 1:
                raise ConfigError(f"{flag} must be at least 1, got {places}")
        if self.max_concurrency is not None and self.concurrency is not None:
            raise ConfigError("--max-concurrency bounds --rate and --trace, not --concurrency")
        if self.burstiness != 1.0 and self.rate is None:
            raise ConfigError("--burstiness needs --rate")
        for flag, number in (("--rate", self.rate), ("--burstiness", self.burstiness)):
            if number is not None and not 0 < number < math.inf:
                raise ConfigError(f"{flag} must be above 0, got {number}")

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} at once"
        bound = f", at most {self.max_concurrency} under way" if self.max_concurrency else ""
        if self.rate is None:
            return f"at given times{bound}"
        gaps = "Poisson" if self.burstiness == 1.0 else f"gamma with burstiness {self.burstiness:g}"
        return f"{self.rate:g} req/s, {gaps}{bound}"

    def due(self, count: int, generator: random.Random) -> Iterator[float]:
        """Seconds from the start at which each of `count` requests is due. Not for a closed loop."""
        if self.times is not None:
            return iter(self.times[:count])
        assert self.rate is not None
        scale = 1 / (self.rate * self.burstiness)
        return accumulate(generator.gammavariate(self.burstiness, scale) for _ in range(count))
