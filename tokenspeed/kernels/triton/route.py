"""Routers: from the scores of all experts to the ids and weights of the chosen ones, one program per token.

Nothing is sorted: an expert's place is the number of experts before it, counted all against all. Equal ones stand in
the order of their ids, so places are distinct whatever the scores are, and every id is one that there is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.launch import dependent_launch, options
from tokenspeed.ops.definitions import Attrs

MOST_EXPERTS = 512
"""Counting takes the square of their number."""
LEAST = tl.constexpr(-(1 << 31))
GREATEST = tl.constexpr((1 << 31) - 1)
TOGETHER = tl.constexpr(64)
"""Experts that all others are compared with at once: with 512 the compiler takes minutes."""
TINY = tl.constexpr(1e-20)
"""Added to the sum that weights are divided by."""
GOLDEN = tl.constexpr(0x61C88647)
"""2^32 divided by the golden ratio, less 2^32: spreads seeds."""
SLOTS = tl.constexpr(4096)
"""Streams of noise of a position, one for each sequence slot."""


class Noise(NamedTuple):
    """For measurements: experts are chosen by uniform noise, keyed by seed, slot and positions int32 [T], and not by
    scores, which random weights send to a few experts."""

    positions: torch.Tensor
    seed: int


@triton.jit
def sortable(value: tl.tensor) -> tl.tensor:
    """int32 in the order of the float32 values: both zeros are equal, and what is no number is greatest."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(value != value, GREATEST, bits ^ ((bits >> 31) & GREATEST))


@triton.jit
def places(keys: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """Of N int32 keys, how many come before each: greater ones, and equal ones in front of it."""
    SOME: tl.constexpr = N if N < TOGETHER else TOGETHER
    at, place = tl.arange(0, N), tl.zeros([N], tl.int32)
    for start in range(0, N, SOME):
        there = start + tl.arange(0, SOME)
        other = tl.gather(keys, there, 0)
        before = (other[None, :] > keys[:, None]) | ((other[None, :] == keys[:, None]) & (there[None, :] < at[:, None]))
        place += tl.sum(before.to(tl.int32), axis=1)
    return place


@triton.jit
def _in_best_groups(choice, inside, KEPT: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr,
                    GROUP_PAD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr):  # fmt: skip
    """choice [GROUP_PAD, WIDTH_PAD], -inf outside the KEPT best groups. PAIRS: a group counts by its two best."""
    choice = tl.where(inside, choice, float("-inf"))
    ranked = tl.where(choice != choice, float("inf"), choice)
    score, first = tl.max(ranked, axis=1, return_indices=True)
    if PAIRS and WIDTH > 1:
        others = tl.where(tl.arange(0, WIDTH_PAD)[None, :] == first[:, None], float("-inf"), ranked)
        score += tl.max(others, axis=1)
    groups = tl.arange(0, GROUP_PAD)
    place = places(tl.where(groups < GROUPS, sortable(score), LEAST), GROUP_PAD)
    return tl.where((place < KEPT)[:, None], choice, float("-inf"))


@triton.jit
def choose(logits, bias, ids, shares, row, scale, live, K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
           GROUPS: tl.constexpr, KEPT: tl.constexpr, WIDTH: tl.constexpr, GROUP_PAD: tl.constexpr,
           WIDTH_PAD: tl.constexpr) -> None:  # fmt: skip
    """ids and shares of a row from its logits [GROUP_PAD, WIDTH_PAD] in float32 and a bias of that shape or None. A row
    that is not live gets ids of -1."""
    N: tl.constexpr = GROUP_PAD * WIDTH_PAD
    inside = (tl.arange(0, GROUP_PAD) < GROUPS)[:, None] & (tl.arange(0, WIDTH_PAD) < WIDTH)[None, :]
    wide = tl.where(inside, logits, float("-inf"))
    score = wide
    if SCORE == "softmax":
        raised = tl.exp(wide - tl.max(wide))
        score = raised / tl.sum(raised)
    elif SCORE == "sigmoid":
        score = tl.sigmoid(wide)
    choice = score
    if bias is not None:
        choice = score + bias
    if GROUPS > 1:
        choice = _in_best_groups(choice, inside, KEPT, SCORE == "sigmoid", GROUPS, GROUP_PAD, WIDTH, WIDTH_PAD)
    place = places(tl.reshape(tl.where(inside, sortable(choice), LEAST), [N]), N)
    chosen = place < K
    share = tl.reshape(score, [N])
    if SCORE == "logits":
        share = tl.exp(share - tl.max(tl.where(chosen, share, float("-inf"))))
        share = share / tl.sum(tl.where(chosen, share, 0.0))
    elif RENORMALIZE:
        share = share / (tl.sum(tl.where(chosen, share, 0.0)) + TINY)
    expert = tl.reshape(tl.arange(0, GROUP_PAD)[:, None] * WIDTH + tl.arange(0, WIDTH_PAD)[None, :], [N])
    tl.store(ids + row * K + place, tl.where(live, expert, -1), mask=chosen)
    tl.store(shares + row * K + place, share * scale, mask=chosen)


@triton.jit
def scores_of_noise(scores, position, slot, seed, at, EXPERTS: tl.constexpr):
    """Uniform noise of a slot and a position for the experts `at`, in place of scores, which are waited for.

    The last steps of MurmurHash3: `tl.rand` takes 5 us more, most of them for its own instructions, which each launch
    fetches anew.
    """
    bits = ((position.to(tl.int32) * SLOTS + slot) * EXPERTS + at).to(tl.uint32) ^ (seed * GOLDEN)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    noise = ((bits ^ (bits >> 16)) >> 8).to(tl.float32) * (1.0 / 16777216)
    return tl.where(scores == float("inf"), 2.0, noise)


@triton.jit
def route_kernel(logits, bias, slots, positions, ids, shares, stride, seed, scale, K: tl.constexpr, SCORE: tl.constexpr,
                 RENORMALIZE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, WIDTH: tl.constexpr,
                 GROUP_PAD: tl.constexpr, WIDTH_PAD: tl.constexpr, PDL: tl.constexpr) -> None:  # fmt: skip
    """ids, shares [rows, K] of logits [rows, GROUPS * WIDTH]."""
    row = tl.program_id(0).to(tl.int64)
    group, within = tl.arange(0, GROUP_PAD)[:, None], tl.arange(0, WIDTH_PAD)[None, :]
    at, inside = group * WIDTH + within, (group < GROUPS) & (within < WIDTH)
    correction = bias
    if bias is not None:
        correction = tl.load(bias + at, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    live = True
    if slots is not None:
        live = tl.load(slots + row) >= 0
    values = tl.load(logits + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    if positions is not None:
        values = scores_of_noise(values, tl.load(positions + row), tl.load(slots + row), seed, at, GROUPS * WIDTH)
    choose(values, correction, ids, shares, row, scale, live, K, SCORE, RENORMALIZE, GROUPS, KEPT, WIDTH, GROUP_PAD,
           WIDTH_PAD)  # fmt: skip


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    attrs: Attrs,
    slots: torch.Tensor | None = None,
    noise: Noise | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int32 [T, k] and weights float32 [T, k] of the experts that rows of logits [T, experts] choose.

    bias: float32 [experts], added for choosing alone. attrs: of the op `route`. slots: int32 [T]; a row whose slot is
    below 0 is padding and gets ids of -1. noise: needs slots. At most MOST_EXPERTS.
    """
    rows, k, shape = logits.shape[0], attrs["k"], shape_of(logits.shape[1], attrs)
    ids = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    shares = torch.empty(rows, k, dtype=torch.float32, device=logits.device)
    warps = 8 if shape["GROUP_PAD"] * shape["WIDTH_PAD"] >= 128 else 4
    route_kernel[(rows,)](
        logits, bias, slots, noise.positions if noise else None, ids, shares, logits.stride(0),
        noise.seed if noise else 0, attrs["scale"], **shape, **options(warps, dependent_launch(logits.device)),
    )  # fmt: skip
    return ids, shares


def shape_of(experts: int, attrs: Attrs) -> dict[str, Any]:
    """What `choose` is compiled for."""
    groups = attrs["groups"]
    width = experts // groups
    pads = {"GROUP_PAD": triton.next_power_of_2(groups), "WIDTH_PAD": triton.next_power_of_2(width)}
    variant = {"K": attrs["k"], "SCORE": attrs["score"], "RENORMALIZE": attrs["renormalize"]}
    return {**variant, "GROUPS": groups, "KEPT": attrs["kept_groups"], "WIDTH": width, **pads}
