"""The chosen experts of each token by MXFP4 weights: launches."""

from __future__ import annotations

from functools import cache

import torch
import triton

from tokenspeed.kernels.triton.expert_lists import ExpertLists, expert_lists
from tokenspeed.kernels.triton.expert_operands import Experts
from tokenspeed.kernels.triton.expert_sums import combine
from tokenspeed.kernels.triton.expert_tiles import (
    FEW_TOKENS,
    ProductTile,
    choice_splits,
    choice_tile,
    packed_product_tile,
)
from tokenspeed.kernels.triton.launch import dependent_launch, exact_options
from tokenspeed.kernels.triton.packed_expert_products import packed_choice_kernel, packed_experts_kernel
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts

AHEAD_TOKENS = 256
"""Kernels are launched ahead up to so many tokens."""


def packed_by_choice(
    x: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor,
    given: Experts,
    first: ProductTile | None = None,
    second: ProductTile | None = None,
    splits: tuple[int, int] | None = None,
) -> torch.Tensor:
    """`experts.run_experts` for a few tokens: two kernels. first, second: tiles of gate and up, and of down; splits:
    into how many parts each cuts the columns."""
    (tokens, hidden), k = x.shape, ids.shape[1]
    gate_up, down = packed_parts(given)
    ff = down.shape[2]
    between = torch.empty(tokens * k, ff, dtype=x.dtype, device=x.device)
    first, second = first or choice_tile(tokens * k, 2 * ff), second or choice_tile(tokens * k, hidden)
    _by_choice(x, gate_up, given.gate_up_bias, between, ids, None, first, splits and splits[0], given)
    y = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    _by_choice(between, down, given.down_bias, y, ids, shares, second, splits and splits[1], None)
    return y


def _by_choice(
    x: torch.Tensor,
    weight: Mxfp4Experts,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor | None,
    tile: ProductTile,
    splits: int | None,
    gate: Experts | None,
) -> None:
    """One of the two kernels. gate: whose activation follows; None for down, whose choices are added up by shares."""
    (tokens, k), stored, n = ids.shape, weight.shape[1], y.shape[1]
    tiles, ahead = triton.cdiv(stored, tile.block_n), dependent_launch(x.device)
    splits = splits or choice_splits(tiles * tokens * k, weight.cols)
    parts = torch.empty(tokens * k, splits, stored, dtype=torch.float32, device=x.device)
    counters = _counters(x.device, weight.q.data_ptr(), max(tokens, FEW_TOKENS) * k * tiles)
    act, alpha, limit = (gate.act, gate.alpha, gate.limit) if gate else ("none", 0.0, 0.0)
    packed_choice_kernel[(tiles, tokens * k, splits)](
        x, weight.q, weight.scale, bias, parts, y, ids, shares, counters, x.stride(0), n, alpha, limit,
        CHOICES=k if gate else 1, GROUP=1 if gate else k, SPLITS=splits, K=weight.cols, ROWS=tile.rows,
        BLOCK_N=tile.block_n, STAGES=tile.stages, ACT=act, POLICY=_policy(tile), PREFETCH=tile.prefetch,
        EARLY=gate is None, FAST=_fast(x), **exact_options(tile.warps, ahead),
    )  # fmt: skip


def packed_in_blocks(
    x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, given: Experts, tile: ProductTile | None = None
) -> torch.Tensor:
    """`experts.run_experts` for any number of tokens."""
    (tokens, hidden), k = x.shape, ids.shape[1]
    gate_up, down = packed_parts(given)
    tile = tile or packed_product_tile(tokens, given.number, k)
    ahead = tokens <= AHEAD_TOKENS and dependent_launch(x.device)
    lists = expert_lists(ids, given.number, tile.rows, ahead)
    between = torch.empty(tokens * k, down.shape[2], dtype=x.dtype, device=x.device)
    _products(x, gate_up, given.gate_up_bias, between, lists, tile, k, ahead, given)
    parts = torch.empty(tokens * k, hidden, dtype=x.dtype, device=x.device)
    _products(between, down, given.down_bias, parts, lists, tile, 1, ahead, None)
    return combine(parts, ids, shares, x.dtype, ahead)


def packed_parts(given: Experts) -> tuple[Mxfp4Experts, Mxfp4Experts]:
    """Gate and up, and down."""
    assert isinstance(given.gate_up, Mxfp4Experts)
    assert isinstance(given.down, Mxfp4Experts)
    return given.gate_up, given.down


def _products(
    x: torch.Tensor,
    weight: Mxfp4Experts,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    lists: ExpertLists,
    tile: ProductTile,
    choices: int,
    ahead: bool,
    gate: Experts | None,
) -> None:
    """One of the two products of the lists' blocks. choices: how many share a row of x. gate: whose activation follows,
    None for down, in front of which another kernel has waited since the lists were made."""
    act, alpha, limit = (gate.act, gate.alpha, gate.limit) if gate else ("none", 0.0, 0.0)
    packed_experts_kernel[(triton.cdiv(weight.shape[1], tile.block_n), len(lists.blocks))](
        x, weight.q, weight.scale, bias, y, lists.order, lists.blocks, x.stride(0), y.shape[1], alpha, limit,
        CHOICES=choices, K=weight.cols, ROWS=tile.rows, BLOCK_N=tile.block_n, STAGES=tile.stages, ACT=act,
        POLICY=_policy(tile), PREFETCH=tile.prefetch, EARLY=gate is None, FAST=_fast(x),
        **exact_options(tile.warps, ahead),
    )  # fmt: skip


def _fast(x: torch.Tensor) -> bool:
    """As `mxfp4_codes.quarters` has it."""
    return x.dtype == torch.bfloat16 and dependent_launch(x.device)


def _policy(tile: ProductTile) -> str:
    return "evict_first" if tile.stream else ""


@cache
def _counters(device: torch.device, address: int, number: int) -> torch.Tensor:
    """Of the layer whose weights are there: no two kernels that use them run at once."""
    return torch.zeros(number, dtype=torch.int32, device=device)
