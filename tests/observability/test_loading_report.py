"""A load shows a bar on a terminal, and lines of the log elsewhere."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from tokenspeed.observability.loading import LoadingReport


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_of_the_log(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    caplog.set_level(logging.INFO, "tokenspeed")
    with LoadingReport() as report:
        for broken_off in (True, False, False):  # an engine may be started again
            for seconds, done in ((0, 0), (9, 1), (2, 2), (5, 3), (4, 4))[: 2 if broken_off else 5]:
                clock[0] += seconds
                report(done * 10**9, 4 * 10**9)
    once = ["loading: 2.0 of 4.0 GB", "loaded 4.00 GB in 20.0 s (0.2 GB/s)"]
    assert [record.getMessage() for record in caplog.records] == once * 2
    assert not stderr.getvalue()


def test_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with LoadingReport() as report:
        report(0, 3_000_000)
        report(1_500_000, 3_000_000)
    assert "loading:" in terminal.getvalue()
    assert "3.00M" in terminal.getvalue()
    assert terminal.getvalue().rstrip(" ").endswith("\r")
    assert not caplog.records


def test_a_single_report(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tokenspeed")
    LoadingReport()(7, 7)
    assert len(caplog.records) == 1
