"""Norm, router and choice as one kernel in the interpreter: what the kernels apart give, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.expert_cases import ROUTERS, Router, naive_route
from tests.kernels.triton.dense_reference import prepared, random_prologue
from tests.seeds import SEED
from tokenspeed.bench.gpu.expert_cases import poisoned
from tokenspeed.kernels.triton import router as module
from tokenspeed.kernels.triton.router import Routed, route_rows

FP32 = torch.float32


def check(
    case: Router,
    kind: str,
    dtype: torch.dtype,
    tokens: int = 5,
    hidden: int = 70,
    biased: bool = False,
    route: Callable[..., Routed | None] = route_rows,
) -> None:
    """Ids and weights of the scores that float64 gives, rounded as the router's product is."""
    print(f"seed {SEED}")
    g = torch.Generator().manual_seed(SEED)
    x = (2 * torch.randn(tokens, hidden + 8, generator=g)).to(dtype)[:, 8:]
    weight = (torch.randn(case.experts, hidden, generator=g) / hidden**0.5).to(dtype)
    bias = torch.randn(case.experts, generator=g) if biased else None
    correction = 0.3 * torch.randn(case.experts, generator=g) if case.biased else None
    prologue = random_prologue(kind, tokens, hidden, dtype, g)
    assert prologue is not None
    slots = torch.arange(tokens, dtype=torch.int32) - 1
    with poisoned():
        found = route(x, prologue, weight, bias, correction, case.attrs, slots)
    assert found is not None
    rows, joined = prepared(x, prologue)
    rtol, atol = (1e-5, 1e-5) if dtype == FP32 else (1e-2, 0.02)  # a branch is rounded before the sum
    torch.testing.assert_close(found.normed, rows, rtol=rtol, atol=atol)
    assert (found.joined is None) == (joined is None)
    if joined is not None:
        torch.testing.assert_close(found.joined, joined, rtol=rtol, atol=atol)
    scores = rows.double() @ weight.double().T + (0 if bias is None else bias.to(dtype).double())
    logits = scores.to(dtype).float().numpy()
    ids, shares, margins = naive_route(case, logits, None if correction is None else correction.numpy())
    assert (found.ids[0] == -1).all()
    clear = margins > (1e-4 if dtype == FP32 else 0.02)
    clear[0] = False
    assert (found.ids.numpy()[clear] == ids[clear]).all()
    np.testing.assert_allclose(found.shares.numpy()[clear], shares[clear], rtol=1e-4 if dtype == FP32 else 0.05)
    if dtype == FP32:
        assert clear.any()


@pytest.mark.parametrize("case", [ROUTERS[0], ROUTERS[5], ROUTERS[8]], ids=lambda case: case.name)
def test_routers(case: Router) -> None:
    check(case, "join", FP32, biased=case.name == "gpt_oss")


@pytest.mark.parametrize("kind, dtype", [("norm", torch.bfloat16), ("branch", FP32)])
def test_what_comes_before(kind: str, dtype: torch.dtype) -> None:
    check(ROUTERS[0], kind, dtype)


@pytest.mark.parametrize("kind", ["norm", "branch"])
def test_more_tokens_by_kernels_apart(kind: str) -> None:
    check(ROUTERS[0], kind, FP32, tokens=17, biased=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["norm", "join", "branch"])
@pytest.mark.parametrize("case", ROUTERS, ids=lambda case: case.name)
def test_every_router(case: Router, kind: str) -> None:
    check(case, kind, FP32, tokens=9, hidden=131)


def test_counters_are_zeros_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counters: list[torch.Tensor] = []

    def kept(*key: Any) -> torch.Tensor:
        counters.append(torch.zeros(16, dtype=torch.int32))
        return counters[-1]

    monkeypatch.setattr(module, "_counters", kept)
    check(ROUTERS[0], "norm", FP32)
    assert len(counters) == 1
    assert not counters[0].any()
