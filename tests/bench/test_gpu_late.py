"""The check of kernels behind a late one: its cases depend on what comes late, and a stale read is seen."""

from __future__ import annotations

import tests.kernels.triton.interpreter  # noqa: F401, isort: skip
import pytest
import torch

from tokenspeed.bench.gpu import late
from tokenspeed.bench.gpu.late import Case, holds, triton_cases
from tokenspeed.kernels.triton import attention_tiles


@pytest.mark.parametrize("number", range(8))
def test_results_are_those_of_what_came_late(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "MAX_SPLITS", 1)  # few programs for the interpreter
    monkeypatch.setattr(late, "RUNS", 1)
    case = triton_cases("cpu")[number]
    assert holds(case)
    fresh = case.run(case.written)
    assert all(bool(each.isfinite().all()) for each in fresh)
    stale = case.run(torch.full_like(case.written, torch.nan))
    assert not any(torch.equal(a, b) for a, b in zip(fresh, stale, strict=True))


def test_a_stale_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("reads", torch.randn(3000), lambda written: [written + 1])
    assert holds(case)
    monkeypatch.setattr(late, "write_late", lambda values, target: target[:-1].copy_(values[:-1]))
    assert not holds(case)
