"""Routers in the interpreter against float64 and against the reference's order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.expert_cases import ROUTERS, Router, naive_route
from tests.program.random_programs import random_step
from tests.seeds import SEED
from tokenspeed.kernels.triton.route import route
from tokenspeed.ops.reference import REFERENCE

VIEW = random_step(0, layers=1, kv_heads=1, head_dim=8)()
each_router = pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)
MARGIN = 1e-5
"""By which a choice must be clear to be compared."""


@each_router
def test_against_float64(router: Router) -> None:
    print(f"seed {SEED}")
    logits, bias = router.random(17, np.random.default_rng(SEED))
    ids, shares, margins = naive_route(router, logits, bias)
    wide = torch.from_numpy(np.pad(logits, ((0, 0), (3, 2)), constant_values=np.nan))[:, 3:-2]
    got = route(wide, None if bias is None else torch.from_numpy(bias), router.attrs)
    assert (got[0].dtype, got[1].dtype) == (torch.int32, torch.float32)
    clear = margins > MARGIN
    assert clear.sum() > 12
    assert (got[0].numpy()[clear] == ids[clear]).all()
    np.testing.assert_allclose(got[1].numpy()[clear], shares[clear], rtol=4e-6)


@each_router
def test_equal_scores_go_to_lower_ids_as_in_the_reference(router: Router) -> None:
    """Scores of few values, zeros of both signs and infinite ones: the order is that of the ids."""
    rng = np.random.default_rng(SEED)
    values = np.array([-np.inf, -1.5, -0.0, 0.0, 1.5], np.float32)
    logits = torch.from_numpy(rng.choice(values, size=(23, router.experts)))
    logits[:, 0] = 1.5  # a softmax needs one that is finite
    ids, shares = route(logits, None, router.attrs)
    wanted = REFERENCE["route"](VIEW, (logits,), (), router.attrs)
    assert torch.equal(ids, wanted[0])
    torch.testing.assert_close(shares, wanted[1], rtol=4e-6, atol=0)


@each_router
def test_scores_that_are_no_numbers_choose_experts_that_there_are(router: Router) -> None:
    logits = torch.randn(9, router.experts, generator=torch.Generator().manual_seed(SEED))
    logits[:3] = torch.nan
    logits[3:6, router.experts // 2] = torch.tensor([torch.nan, -torch.nan, torch.nan])
    ids, _ = route(logits, None, router.attrs)
    assert torch.equal(ids, REFERENCE["route"](VIEW, (logits,), (), router.attrs)[0])
    for row in ids.tolist():
        assert len(set(row)) == router.attrs["k"]
        assert set(row) <= set(range(router.experts))


def test_padding_chooses_nobody() -> None:
    router = ROUTERS[0]
    logits = torch.randn(3, router.experts, generator=torch.Generator().manual_seed(SEED))
    ids, _ = route(logits, None, router.attrs, torch.tensor([4, -1, 0], dtype=torch.int32))
    assert (ids[1] == -1).all()
    assert torch.equal(ids[::2], route(logits[::2], None, router.attrs)[0])
