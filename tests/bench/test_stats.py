from __future__ import annotations

import itertools
import math
import random
import statistics
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.bench import stats


def test_summary_of_known_numbers():
    summary = stats.summarise([7.0, 1.0, 3.0, 5.0, 100.0])
    assert (summary.minimum, summary.lower_quartile, summary.median) == (1.0, 3.0, 5.0)
    assert (summary.upper_quartile, summary.maximum, summary.iqr, summary.count) == (7.0, 100.0, 4.0, 5)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_summary_equals_numpys_quantiles(samples):
    summary = stats.summarise(samples)
    ours = [summary.minimum, summary.lower_quartile, summary.median, summary.upper_quartile, summary.maximum]
    np.testing.assert_allclose(ours, np.quantile(samples, [0, 0.25, 0.5, 0.75, 1]), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(
    "n, low, high, confidence",
    # Ranks of the two-sided 95 % sign-test interval, as tables of the binomial distribution give them.
    [
        (1, 1, 1, 0.0),
        (2, 1, 2, 0.5),
        (5, 1, 5, 0.9375),
        (6, 1, 6, 0.96875),
        (9, 2, 8, 0.9609375),
        (10, 2, 9, 0.978515625),
        (15, 4, 12, 0.96484375),
        (20, 6, 15, 0.95861053466796875),
    ],
)
def test_interval_ranks_of_known_sample_sizes(n, low, high, confidence):
    samples = [float(rank) for rank in range(1, n + 1)]
    random.Random(n).shuffle(samples)
    interval = stats.median_interval(samples, 0.95)
    assert (interval.low, interval.high, interval.count) == (low, high, n)
    assert interval.median == (n + 1) / 2
    assert interval.confidence == pytest.approx(confidence, abs=1e-12)


@pytest.mark.parametrize("n, wanted, seed", [(5, 0.95, 11), (7, 0.8, 12), (13, 0.95, 13), (24, 0.9, 14)])
def test_interval_covers_the_true_median_as_often_as_it_says(n, wanted, seed):
    trials = 2000
    draws = np.random.default_rng(seed).lognormal(size=(trials, n))  # median 1, heavily skewed
    intervals = [stats.median_interval(list(map(float, row)), wanted) for row in draws]
    claimed = intervals[0].confidence
    covered = sum(interval.low <= 1.0 <= interval.high for interval in intervals) / trials
    assert covered == pytest.approx(claimed, abs=4 * math.sqrt(claimed * (1 - claimed) / trials))
    assert claimed >= wanted or (intervals[0].low, intervals[0].high) == (draws[0].min(), draws[0].max())


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, float("nan")])
def test_a_confidence_that_cannot_be_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        stats.median_interval([1.0, 2.0], confidence)


def test_no_samples_are_refused():
    for function in (stats.summarise, stats.median_interval):
        with pytest.raises(ValueError, match="no samples"):
            function([])


@pytest.mark.parametrize("pairs, warmup", [(1, 0), (3, 0), (4, 2), (5, 1)])
def test_order_alternates_and_a_calibration_precedes_every_counted_run(pairs, warmup):
    calls: list[str] = []
    counter = itertools.count(1)

    def note(name: str) -> float:
        calls.append(name)
        return float(next(counter))

    result = stats.paired(lambda: note("A"), lambda: note("B"), pairs, warmup, calibrate=lambda: note("c"))
    expected = ["A", "B"] * warmup
    for pair in range(pairs):
        expected += ["c", "A", "c", "B"] if pair % 2 == 0 else ["c", "B", "c", "A"]
    assert calls == expected
    figures = {"A": result.a, "B": result.b}
    positions = {name: [i + 1.0 for i, call in enumerate(calls) if call == name and i >= 2 * warmup] for name in "AB"}
    assert figures == positions
    assert result.calibration_a == [position - 1 for position in result.a]
    assert result.calibration_b == [position - 1 for position in result.b]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pairing_cancels_a_steady_drift(seed):
    """The machine slows down by 5 % per run and A is 1.5 times B: ratios of means would be off, the median is not."""
    noise = random.Random(seed)
    clock = itertools.count()

    def run(cost: float) -> float:
        return cost * 1.05 ** next(clock) * noise.uniform(0.999, 1.001)

    result = stats.paired(lambda: run(1.5), lambda: run(1.0), pairs=12, warmup=0, calibrate=lambda: 0.01)
    interval = result.ratio()
    assert interval.low <= 1.5 <= interval.high
    assert interval.median == pytest.approx(1.5, rel=0.01)
    assert interval.median == statistics.median(a / b for a, b in zip(result.a, result.b, strict=True))


def test_drift_and_samples():
    result = stats.PairedResult([2.0, 4.0], [1.0, 1.0], [0.01, 0.02], [0.01, 0.015])
    assert result.drift() == 2.0
    assert result.ratios() == [2.0, 4.0]
    names = {"a", "b", "calibration_a", "calibration_b"}
    assert result.samples().keys() == names
    assert result.samples()["calibration_b"] == [0.01, 0.015]


@pytest.mark.parametrize("figure", [0.0, -1.0, math.inf, math.nan])
def test_a_meaningless_figure_is_refused_and_named(figure):
    with pytest.raises(ValueError, match=r"run b gave .* in pair 0"):
        stats.paired(lambda: 1.0, lambda: figure, pairs=2, calibrate=lambda: 0.01)


@pytest.mark.parametrize("runs, warmup", [(1, 0), (7, 1), (3, 2)])
def test_repeated_runs_follow_a_calibration_each_and_the_warmup_is_thrown_away(runs, warmup):
    calls: list[str] = []

    def note(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    result = stats.repeated(lambda: note("run"), runs, warmup, calibrate=lambda: note("c"))
    assert calls == ["run"] * warmup + ["c", "run"] * runs
    assert result.figures == [warmup + 2.0 * (number + 1) for number in range(runs)]
    assert result.samples() == {"figures": result.figures, "calibration_s": [each - 1 for each in result.figures]}


@pytest.mark.parametrize("runs, warmup", [(0, 1), (-1, 0), (1, -1)])
def test_runs_and_warmup_out_of_range(runs, warmup):
    with pytest.raises(ValueError, match="runs"):
        stats.repeated(lambda: 1.0, runs, warmup)


@pytest.mark.parametrize("pairs, warmup", [(0, 1), (-1, 0), (1, -1)])
def test_pairs_and_warmup_out_of_range(pairs, warmup):
    with pytest.raises(ValueError, match="pairs"):
        stats.paired(lambda: 1.0, lambda: 1.0, pairs, warmup)


def test_timed_gives_seconds_and_calibration_is_short():
    run = stats.timed(lambda: time.sleep(0.02))
    assert 0.02 <= run() < 2
    assert 0 < stats.calibration_loop() < 2
