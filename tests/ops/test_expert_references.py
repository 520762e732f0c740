"""Routers and experts: the torch references against float64 arithmetic written another way, shapes and costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.expert_cases import ROUTERS, Router, naive_experts, naive_route
from tests.program.random_programs import random_step
from tests.seeds import SEED
from tokenspeed.contracts.errors import FormatError
from tokenspeed.layers.moe import Moe
from tokenspeed.ops.definitions import OPS, Operands, Workload, distinct_experts
from tokenspeed.ops.reference import REFERENCE

VIEW = random_step(0, layers=1, kv_heads=1, head_dim=8)()
ACTS = [
    {"act": "silu", "alpha": 0.0, "limit": 0.0},
    {"act": "gelu_tanh", "alpha": 0.0, "limit": 0.0},
    {"act": "swiglu_clamped", "alpha": 1.702, "limit": 0.8},
]


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)
def test_route(router: Router, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, bias = router.random(61, rng)
    ids, shares, margins = naive_route(router, logits, bias)
    weights = () if bias is None else (torch.from_numpy(bias),)
    got = REFERENCE["route"](VIEW, (torch.from_numpy(logits),), weights, router.attrs)
    assert (got[0].dtype, got[1].dtype) == (torch.int32, torch.float32)
    clear = margins > 1e-5
    assert clear.sum() > 50
    assert (got[0].numpy()[clear] == ids[clear]).all()
    np.testing.assert_allclose(got[1].numpy()[clear], shares[clear], rtol=2e-6)


def test_equal_scores_go_to_the_lower_ids() -> None:
    for router in ROUTERS:
        logits = torch.zeros(3, router.experts)
        ids, shares = REFERENCE["route"](VIEW, (logits,), (), router.attrs)
        assert ids.tolist() == [list(range(router.attrs["k"]))] * 3
        assert (shares == shares[:, :1]).all()


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("attrs", ACTS, ids=lambda attrs: attrs["act"])
def test_experts(attrs: dict[str, Any], biased: bool, dtype: torch.dtype, tolerance: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, count, k, hidden, ff = 9, 5, 3, 33, 21
    shapes = [(count, 2 * ff, hidden), (count, hidden, ff)] + [(count, 2 * ff), (count, hidden)] * biased
    weights = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]
    weights[:2] = [values.to(dtype) for values in weights[:2]]
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(tokens)]).int()
    shares = torch.rand(tokens, k, generator=generator)
    (got,) = REFERENCE["experts"](VIEW, (x, ids, shares), weights, attrs)
    biases = [bias.to(dtype).double().numpy() for bias in weights[2:]]
    matrices = [values.double().numpy() for values in weights[:2]]
    expected = naive_experts(x.double().numpy(), ids.numpy(), shares.double().numpy(), matrices, biases, attrs)
    assert got.dtype == dtype
    error = np.linalg.norm(got.double().numpy() - expected) / np.linalg.norm(expected)
    assert error < tolerance


def test_distinct_experts_against_draws() -> None:
    """The mean over many draws of the formula's model: every token takes k of them uniformly."""
    rng = np.random.default_rng(7)
    for count, k, tokens in ((128, 8, 1), (128, 8, 8), (32, 4, 8), (5, 2, 3)):
        draws = [len({e for _ in range(tokens) for e in rng.permutation(count)[:k]}) for _ in range(600)]
        assert np.mean(draws) == pytest.approx(distinct_experts(count, k, tokens), rel=0.03)
    assert distinct_experts(128, 8, 1) == pytest.approx(8)
    assert round(distinct_experts(128, 8, 8), 1) == 51.6


@pytest.mark.parametrize("tokens", [1, 7])
def test_cost_counted_by_hand(tokens: int) -> None:
    count, k, hidden, ff = 16, 4, 32, 24
    shapes = ((count, 2 * ff, hidden), (count, hidden, ff))
    operands = Operands((("T", hidden), ("T", k), ("T", k)), (("T", hidden),), ("up", "down"), shapes, {})
    work = Workload(tokens, tokens, tokens, 10, 2, 2, {"up": 2.0 * math.prod(shapes[0]), "down": math.prod(shapes[1])})
    cost = OPS["experts"].cost(operands, work)
    share = 1 - (1 - k / count) ** tokens
    assert cost.weight_bytes == pytest.approx(share * count * hidden * ff * (4 + 1))
    assert cost.flops == 2 * tokens * k * 3 * hidden * ff
    assert cost.kv_bytes == 0


@pytest.mark.parametrize(
    "op, inputs, weights, attrs",
    [
        ("route", [("T", 6)], [], {"k": 7, "groups": 1, "kept_groups": 1}),
        ("route", [("T", 6)], [], {"k": 2, "groups": 4, "kept_groups": 1}),
        ("route", [("T", 6)], [], {"k": 2, "groups": 3, "kept_groups": 4}),
        ("experts", [("T", 8), ("T", 2), ("T", 2)], [(4, 6, 9), (4, 9, 3)], {}),
        ("experts", [("T", 8), ("T", 2), ("T", 2)], [(4, 6, 8), (4, 8, 4)], {}),
        ("experts", [("T", 8), ("T", 2), ("T", 3)], [(4, 6, 8), (4, 8, 3)], {}),
    ],
)
def test_shapes_that_do_not_fit(op: str, inputs: Any, weights: Any, attrs: Any) -> None:
    with pytest.raises(ValueError, match="fit"):
        OPS[op].infer(tuple(inputs), tuple(weights), attrs)


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"top_k": 7}, "7 of 6"),
        ({"top_k": 3, "groups": 3, "kept_groups": 1}, "3 of 2"),
        ({"top_k": 1, "groups": 4}, "groups of 6"),
        ({"top_k": 1, "groups": 2, "kept_groups": 3}, "3 of 2 groups"),
    ],
)
def test_experts_that_cannot_be_chosen(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(FormatError, match=word):
        Moe(6, ff_size=8, **settings)
