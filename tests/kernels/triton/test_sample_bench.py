"""The sampling benchmark's list and its check, as far as they go without a GPU."""

from __future__ import annotations

import pytest

from tokenspeed.bench.gpu import sample as bench
from tokenspeed.runner import sampler


def test_cases_have_names_of_their_own_and_begin_with_the_tables_tiles() -> None:
    names = [case.name for case in bench.cases()]
    assert len(set(names)) == len(names)
    for rows in bench.ROWS:
        for kind in bench.KINDS:
            assert any(name.startswith(f"{kind} B={rows} ") and name.endswith(" usual") for name in names)


def test_check_compares_with_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {kind: bench.KINDS[kind] for kind in ("greedy", "penalties")}
    monkeypatch.setattr(bench, "KINDS", kinds)
    assert bench.check(rows=3, vocab=90, device="cpu")
    wrong = sampler.sampler_inputs
    monkeypatch.setattr(sampler, "sampler_inputs", lambda rows, *rest: wrong(rows[::-1], *rest))
    assert not bench.check(rows=3, vocab=90, device="cpu")
