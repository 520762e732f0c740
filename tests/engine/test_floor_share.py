"""The share of the floor that a running engine tells, and the time its device had nothing to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tokenspeed.engine import floor
from tokenspeed.engine.floor import FloorShare


@pytest.fixture
def bytes_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A step of b sequences of c tokens moves 1e9 * b + c bytes; the calls."""
    calls: list[tuple[int, int]] = []

    def step_bytes(model: Any, weight_bytes: Any, kv_bytes: float, batch: int, context: int) -> float:
        calls.append((batch, context))
        return 1e9 * batch

    monkeypatch.setattr(floor, "step_bytes", step_bytes)
    return calls


def test_share_of_the_steps_since_the_last_update(bytes_of: list[tuple[int, int]]) -> None:
    share = FloorShare(SimpleNamespace(file_bytes={}), 2.0, read_gbs=10.0)  # type: ignore[arg-type]
    share.update(0, 0, 0.0, 0)
    assert share.share is None
    share.update(10, 10, 2.0, 700)
    assert share.share == pytest.approx(10 * 0.1 / 2.0)
    share.update(15, 30, 4.0, 800)
    assert share.share == pytest.approx(5 * 0.4 / 2.0)
    share.update(15, 30, 4.0, 0)
    assert share.share == pytest.approx(1.0), "nothing new: the last one stays"
    share.update(20, 50, 8.0, 0)
    assert share.share == pytest.approx(5 * 0.4 / 4.0)
    assert bytes_of == [(1, 768), (4, 768)], "contexts are rounded, and floors kept"
