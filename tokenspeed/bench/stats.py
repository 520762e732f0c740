"""Statistics of two things run alternately on a machine whose speed wanders: only ratios inside a pair are claimed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec

CALIBRATION_STEPS = 400_000
"""Some 10 to 20 ms of one core."""
GATE_RUNS = 7
"""Fewest runs whose lower quartile may decide whether an absolute target is met."""


class Summary(msgspec.Struct, frozen=True):
    """Order statistics of a sample, in the sample's unit. Quartiles interpolate between neighbours."""

    count: int
    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float
    maximum: float

    @property
    def iqr(self) -> float:
        """Upper minus lower quartile."""
        return self.upper_quartile - self.lower_quartile


class MedianInterval(msgspec.Struct, frozen=True):
    """A sample's median with an interval for the median of what it was drawn from.

    `confidence` is what [low, high] really reaches: more than was asked for, or less where the sample is too small.
    """

    median: float
    low: float
    high: float
    confidence: float
    count: int


class PairedResult(msgspec.Struct, frozen=True):
    """Figures of pair i at index i. Calibrations: seconds of a fixed loop, timed right before each run."""

    a: list[float]
    b: list[float]
    calibration_a: list[float]
    calibration_b: list[float]

    def ratios(self) -> list[float]:
        """a / b, pair by pair."""
        return [a / b for a, b in zip(self.a, self.b, strict=True)]

    def ratio(self, confidence: float = 0.95) -> MedianInterval:
        """The median of the pairs' ratios and its interval."""
        return median_interval(self.ratios(), confidence)

    def drift(self) -> float:
        """Slowest over fastest calibration: 1.0 on a machine that kept its speed."""
        calibrations = self.calibration_a + self.calibration_b
        return max(calibrations) / min(calibrations)

    def samples(self) -> dict[str, list[float]]:
        """Every figure and calibration, as `Record.samples` keeps them."""
        return msgspec.structs.asdict(self)


class RepeatedResult(msgspec.Struct, frozen=True):
    """Figures of one thing run several times, and the calibration loop's seconds right before each."""

    figures: list[float]
    calibration: list[float]

    def samples(self) -> dict[str, list[float]]:
        """Every figure and calibration, as `Record.samples` keeps them."""
        return {"figures": self.figures, "calibration_s": self.calibration}


def summarise(samples: Sequence[float]) -> Summary:
    """Raises ValueError on an empty sample."""
    _require_samples(samples)
    lower, median, upper = (
        statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [*samples] * 3
    )
    return Summary(len(samples), median, lower, upper, min(samples), max(samples))


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> MedianInterval:
    """Distribution-free interval for the median: the sign test, inverted.

    With the sample sorted as x(1) <= ... <= x(n), [x(k), x(n+1-k)] misses the median of any continuous distribution
    with probability 2 P(Bin(n, 1/2) <= k - 1). k is the largest that keeps this at most 1 - confidence, and at least 1:
    below 6 samples even [x(1), x(n)] stays under 95 %, at 1 - 2^(1-n). Ties only raise the coverage.
    Source: David and Nagaraja, Order Statistics, 3rd edition, section 7.1.

    Raises ValueError on an empty sample or a confidence outside (0, 1).
    """
    _require_samples(samples)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}")
    ordered, n = sorted(samples), len(samples)
    k = max((k for k in range(1, n // 2 + 1) if _coverage(n, k) >= confidence), default=1)
    return MedianInterval(statistics.median(ordered), ordered[k - 1], ordered[n - k], _coverage(n, k), n)


def _coverage(n: int, k: int) -> float:
    """1 - 2 P(Bin(n, 1/2) <= k - 1), 0 for a single sample."""
    misses = 2 * sum(math.comb(n, i) for i in range(k))
    return max(0.0, 1 - misses / 2**n)


def calibration_loop() -> float:
    """Seconds that a fixed piece of arithmetic takes on one core now."""
    start = time.perf_counter()
    total = 0
    for i in range(CALIBRATION_STEPS):
        total += i & 7
    return time.perf_counter() - start


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Make a run for `paired` out of any call: its figure is its wall time in seconds."""

    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


def paired(
    run_a: Callable[[], float],
    run_b: Callable[[], float],
    pairs: int,
    warmup: int = 1,
    calibrate: Callable[[], float] = calibration_loop,
) -> PairedResult:
    """Run A B, B A, A B, ... so that a steady drift of the machine favours neither.

    A run returns its own figure in any unit (seconds, tokens per second), the same for both. `warmup` pairs come first
    and are thrown away. Raises ValueError on pairs < 1, warmup < 0, or a figure that is not finite and positive.
    """
    if pairs < 1 or warmup < 0:
        raise ValueError(f"need pairs >= 1 and warmup >= 0, got pairs={pairs}, warmup={warmup}")
    for _ in range(warmup):
        run_a()
        run_b()
    result = PairedResult([], [], [], [])
    sides = [("a", run_a, result.a, result.calibration_a), ("b", run_b, result.b, result.calibration_b)]
    for pair in range(pairs):
        for name, run, figures, calibrations in sides if pair % 2 == 0 else reversed(sides):
            calibrations.append(calibrate())
            figure = run()
            if not (math.isfinite(figure) and figure > 0):
                raise ValueError(f"run {name} gave {figure!r} in pair {pair}; a figure must be finite and positive")
            figures.append(figure)
    return result


def repeated(
    run: Callable[[], float], runs: int, warmup: int = 1, calibrate: Callable[[], float] = calibration_loop
) -> RepeatedResult:
    """Run it `warmup` times for nothing and `runs` times for its figure. Raises ValueError on runs < 1, warmup < 0."""
    if runs < 1 or warmup < 0:
        raise ValueError(f"need runs >= 1 and warmup >= 0, got runs={runs}, warmup={warmup}")
    for _ in range(warmup):
        run()
    result = RepeatedResult([], [])
    for _ in range(runs):
        result.calibration.append(calibrate())
        result.figures.append(run())
    return result


def _require_samples(samples: Sequence[float]) -> None:
    if not samples:
        raise ValueError("no samples")
