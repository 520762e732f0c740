"""Norm, router and choice of a few tokens in one kernel: who ends last of a token's programs chooses.

A program has some experts' scores of one token. It asks for their weights before it waits, repeats the token's norm,
and counts itself; the last one, by when all scores are there, ranks them. The first one writes the joined and the
normed row, which the experts take.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.launch import dependent_launch, options
from tokenspeed.kernels.triton.linear import project
from tokenspeed.kernels.triton.norm import norm_rows
from tokenspeed.kernels.triton.operands import Prologue
from tokenspeed.kernels.triton.route import Noise, choose, route, scores_of_noise, shape_of
from tokenspeed.kernels.triton.rows import rstd
from tokenspeed.ops.definitions import Attrs

FEW_TOKENS = 16
"""Up to here norm, router and choice are one kernel."""
MOST_COLUMNS = 8192
"""Of a row, which a program holds whole."""
_EXPERTS = 4
"""Whose scores a program has."""


class Routed(NamedTuple):
    """ids int32 [T, k], shares float32 [T, k]; normed and joined [T, hidden] in the dtype of x, joined None without a
    branch."""

    ids: torch.Tensor
    shares: torch.Tensor
    normed: torch.Tensor
    joined: torch.Tensor | None


@triton.jit
def _normed_row(x, branch, norm_weight, branch_weight, joined, normed, row, x_stride, branch_stride, eps, branch_eps,
                cols, written, COLS: tl.constexpr):  # fmt: skip
    """A row, joined and normed, as `norm.rows_kernel` rounds it, in float32. written: columns of both to write."""
    inside = cols < COLS
    value = tl.load(x + row * x_stride + cols, mask=inside, other=0.0)
    dtype: tl.constexpr = value.dtype
    if branch is not None:
        other = tl.load(branch + row * branch_stride + cols, mask=inside, other=0.0).to(tl.float32)
        if branch_weight is not None:
            scale = tl.load(branch_weight + cols, mask=inside, other=0.0)
            other = (other * rstd(other, COLS, branch_eps) * scale).to(dtype).to(tl.float32)
        value = (value.to(tl.float32) + other).to(dtype)
        tl.store(joined + row * COLS + cols, value, mask=cols < written)
    wide = value.to(tl.float32)
    weight = tl.load(norm_weight + cols, mask=inside, other=0.0)
    out = (wide * rstd(wide, COLS, eps) * weight).to(dtype)
    tl.store(normed + row * COLS + cols, out, mask=cols < written)
    return out.to(tl.float32)


@triton.jit
def router_kernel(x, branch, norm_weight, branch_weight, weight, bias, correction, slots, positions, logits, counters,
                  joined, normed, ids, shares, x_stride, branch_stride, w_stride, eps, branch_eps, seed, scale,
                  COLS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, K: tl.constexpr,
                  SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
                  WIDTH: tl.constexpr, GROUP_PAD: tl.constexpr, WIDTH_PAD: tl.constexpr,
                  PDL: tl.constexpr) -> None:  # fmt: skip
    """ids, shares [rows, K] of x [rows, COLS], joined with a branch, normed, and multiplied by weight [experts, COLS].
    logits [rows, experts] are scratch; counters [rows] are zeros before and after."""
    EXPERTS: tl.constexpr = GROUPS * WIDTH
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols, expert = tl.arange(0, BLOCK_K), part * BLOCK_N + tl.arange(0, BLOCK_N)
    there = tl.minimum(expert, EXPERTS - 1)
    w = tl.load(weight + there[:, None] * w_stride + cols[None, :], mask=(cols < COLS)[None, :], other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    value = _normed_row(x, branch, norm_weight, branch_weight, joined, normed, row, x_stride, branch_stride, eps,
                        branch_eps, cols, tl.where(part == 0, COLS, 0), COLS)  # fmt: skip
    sums = tl.sum(w.to(tl.float32) * value[None, :], axis=1)
    dtype: tl.constexpr = x.dtype.element_ty
    if bias is not None:
        sums += tl.load(bias + there).to(dtype).to(tl.float32)
    tl.store(logits + row * EXPERTS + expert, sums.to(dtype), mask=expert < EXPERTS)
    tl.debug_barrier()
    if tl.atomic_add(counters + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counters + row, 0)
        group, within = tl.arange(0, GROUP_PAD)[:, None], tl.arange(0, WIDTH_PAD)[None, :]
        at, inside = group * WIDTH + within, (group < GROUPS) & (within < WIDTH)
        scores = tl.load(logits + row * EXPERTS + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        slot = tl.load(slots + row)
        if positions is not None:
            scores = scores_of_noise(scores, tl.load(positions + row), slot, seed, at, GROUPS * WIDTH)
        added = correction
        if correction is not None:
            added = tl.load(correction + at, mask=inside, other=0.0)
        choose(scores, added, ids, shares, row, scale, slot >= 0, K, SCORE, RENORMALIZE, GROUPS, KEPT, WIDTH, GROUP_PAD,
               WIDTH_PAD)  # fmt: skip


def route_rows(
    x: torch.Tensor,
    prologue: Prologue,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    correction: torch.Tensor | None,
    attrs: Attrs,
    slots: torch.Tensor,
    noise: Noise | None = None,
) -> Routed:
    """`route.route` of the scores weight y (+ bias) of y, which is x [T, hidden] after the prologue; of FEW_TOKENS at
    most in one kernel.

    weight: [experts, hidden] in the dtype of x, rows contiguous; bias, correction: float32 [experts].
    """
    (tokens, hidden), experts, k = x.shape, weight.shape[0], attrs["k"]
    branch, branch_norm = prologue.branch, prologue.branch_norm
    if tokens > FEW_TOKENS:
        rows, joined = norm_rows(x, prologue.norm, branch, branch_norm)
        logits, _ = project(rows.values, weight, bias)
        return Routed(*route(logits, correction, attrs, slots, noise), rows.values, joined)
    ids = torch.empty(tokens, k, dtype=torch.int32, device=x.device)
    shares = torch.empty(tokens, k, dtype=torch.float32, device=x.device)
    normed = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    joined = None if branch is None else torch.empty_like(normed)
    logits = torch.empty(tokens, experts, dtype=x.dtype, device=x.device)
    router_kernel[(triton.cdiv(experts, _EXPERTS), tokens)](
        x, branch, prologue.norm.weight, branch_norm.weight if branch_norm else None, weight, bias, correction, slots,
        noise.positions if noise else None, logits, _counters(x.device, weight.data_ptr()), joined, normed, ids, shares,
        x.stride(0), 0 if branch is None else branch.stride(0), weight.stride(0), prologue.norm.eps,
        branch_norm.eps if branch_norm else 0.0, noise.seed if noise else 0, attrs["scale"], COLS=hidden,
        BLOCK_K=triton.next_power_of_2(hidden), BLOCK_N=_EXPERTS, **shape_of(experts, attrs),
        **options(4 if hidden <= 2048 else 8, dependent_launch(x.device)),
    )  # fmt: skip
    return Routed(ids, shares, normed, joined)


@cache
def _counters(device: torch.device, address: int) -> torch.Tensor:
    """Of the router whose weights are there: no two kernels that use them run at once."""
    return torch.zeros(FEW_TOKENS, dtype=torch.int32, device=device)
