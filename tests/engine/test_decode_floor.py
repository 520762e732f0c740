"""The least time of a decode step, by context."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.tiny_llama import CONTEXT
from tokenspeed.engine import decode_floor
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.timings import decode_bytes
from tokenspeed.observability.ceilings import Ceilings


def test_the_floor_is_bytes_over_the_measured_bandwidth(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_floor, "read_ceilings", lambda: Ceilings("here", read_gbs=0.5))
    points = llm.core.info.decode_floor
    assert points[0][0] == 1
    assert points[-1][0] == llm.core.capacity.max_model_len == CONTEXT
    for context, ms in points:
        assert ms == pytest.approx(1e3 * decode_bytes(llm.core, context)[0] / 0.5e9)
    assert all(low < high for low, high in pairwise(points))


def test_without_a_measurement_there_is_none(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_floor, "read_ceilings", lambda: None)
    assert llm.core.info.decode_floor == []
