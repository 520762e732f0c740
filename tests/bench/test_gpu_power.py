"""The arithmetic of what a part draws, by a meter and a clock that are not there."""

from __future__ import annotations

import pytest

from tokenspeed.bench.gpu.power import Draw, drawn


class Card:
    """Every run takes 10 ms and 5 J, at a clock that falls by 10 MHz with each reading."""

    def __init__(self) -> None:
        self.now, self.spent, self.clock = 100.0, 7.0, 1980.0

    def run(self) -> None:
        self.now += 0.01
        self.spent += 5.0

    def wait(self) -> None:
        """Nothing is under way."""

    def joules(self) -> float:
        return self.spent

    def mhz(self) -> float:
        self.clock -= 10
        return self.clock


def test_what_a_part_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card()
    monkeypatch.setattr("time.perf_counter", lambda: card.now)
    found = drawn(card.run, card.wait, card, count=4, seconds=1.0)
    # A run is four repetitions: 2.5 ms and 1.25 J each, 500 W; ten readings from 1970 down to 1880 MHz.
    assert found == pytest.approx(Draw(2500.0, 500.0, 1925.0, 1250.0))


def test_one_run_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card()
    monkeypatch.setattr("time.perf_counter", lambda: card.now)
    assert drawn(card.run, card.wait, card, count=1, seconds=0.001).us == pytest.approx(10_000)
