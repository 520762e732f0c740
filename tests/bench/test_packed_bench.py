"""The check of packed weights finds what is wrong, and knows what to check; its kernels run in the interpreter here."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.kernels.triton import interpreter  # noqa: F401
from tokenspeed.bench.gpu import packed
from tokenspeed.bench.gpu.packed import KINDS, NOT_STREAMED, ROWS, Case, cases, wrong
from tokenspeed.kernels.triton.linear import project


def test_every_type_is_checked_with_every_number_of_rows() -> None:
    made = cases()
    assert len(set(made)) == len(made)
    found = {(case.kind, case.rows) for case in made if not case.streamed}
    assert found == {(kind, rows) for kind in KINDS for rows in ROWS}
    for kind in KINDS:
        streamed = Counter((case.act, case.prologue) for case in made if case.kind == kind and case.streamed)
        assert len(streamed) == 12
    assert all(case.stored % 4 == 0 for case in made if case.act != "none")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_passes_and_what_is_wrong_does_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "POISON_BYTES", 1 << 12)
    case = Case(kind, 3, 24, 128, "silu", "join", False)
    assert wrong(case, "cpu") is None

    def without_a_row(x: torch.Tensor, *rest: object) -> object:
        y, joined = project(x, *rest)  # type: ignore[arg-type]
        y[-1] = torch.nan
        return y, joined

    monkeypatch.setattr(packed, "project", without_a_row)
    assert "off by" in str(wrong(case, "cpu"))
    monkeypatch.setattr(packed, "stream", lambda *given: None)
    taken = Case(kind, 1, 24, 1024, "none", "bare", True)
    assert wrong(taken, "cpu") == (None if kind in NOT_STREAMED else "the streaming kernel does not take it")
