"""Cases of routers with their experts for the native test program."""

from __future__ import annotations

import numpy as np

from tests.expert_cases import Router, naive_experts, naive_route
from tests.kernels.blocks import random_rows
from tests.kernels.native_cases import PLAIN, Case, width
from tokenspeed.kernels.cpu.registration import FORMATS

MARGIN = 1e-4
"""Scores are drawn again until no choice is closer."""
ACT = {"act": "swiglu_clamped", "alpha": 1.702, "limit": 0.8}


def experts_case(fmt: str, tokens: int, biased: bool, rng: np.random.Generator) -> Case:
    """Two of eight experts, which lie in two groups of which one takes part; sizes of plain formats are odd."""
    count, k, cols, ff = 8, 2, width(fmt, 1), width(fmt, 2)
    router = Router(
        "",
        count,
        {"k": k, "score": "sigmoid", "renormalize": False, "groups": 2, "kept_groups": 1, "scale": 1.0},
        biased,
    )
    logits, bias = router.random(tokens, rng)
    while (margins := naive_route(router, logits, bias)[2] < MARGIN).any():
        logits[margins] = router.random(int(margins.sum()), rng)[0]
    ids, shares, _ = naive_route(router, logits, bias)
    (gate_up, up_values), (down, down_values) = (
        random_rows(fmt, count * rows, columns, rng) for rows, columns in ((2 * ff, cols), (cols, ff))
    )
    biases = [rng.normal(size=(count, size)).astype(np.float32) for size in (2 * ff, cols)] * biased
    x = rng.normal(size=(tokens, cols)).astype(np.float32)
    matrices = [up_values.reshape(count, -1, cols), down_values.reshape(count, -1, ff)]
    expected = naive_experts(x.astype(float), ids, shares, matrices, biases, ACT)
    arrays = dict(zip(("gate_up_bias", "down_bias"), biases, strict=False))
    if bias is not None:
        arrays["router_bias"] = bias
    sizes = {"tokens": tokens, "experts": count, "k": k, "cols": cols, "ff": ff, "biased": biased}
    return f"experts {fmt} {tokens} tokens{', biased' if biased else ''}", {
        "format": FORMATS.index(fmt),
        **sizes,
        "alpha": ACT["alpha"],
        "limit": ACT["limit"],
        "gate_up": gate_up,
        "down": down,
        "x": x,
        "logits": logits,
        **arrays,
        "expected": expected,
        "allowed": np.full(expected.shape, (2e-5 if fmt in PLAIN else 4e-3) * np.abs(expected).max()),
    }
