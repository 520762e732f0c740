"""The chosen experts of each token by MXFP4 weights: launches."""

from __future__ import annotations

from functools import cache

import torch
import triton

from tokenspeed.kernels.triton.expert_lists import ExpertLists, expert_lists
from tokenspeed.kernels.triton.expert_operands import Experts
from tokenspeed.kernels.triton.expert_products import combine_kernel
from tokenspeed.kernels.triton.expert_tiles import FEW_TOKENS, ProductTile, choice_tile, packed_product_tile
from tokenspeed.kernels.triton.launch import dependent_launch, exact_options
from tokenspeed.kernels.triton.packed_expert_products import packed_down_kernel, packed_experts_kernel
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts

AHEAD_TOKENS = 256
"""Kernels are launched ahead up to so many tokens."""
_COLUMNS = 1024


def packed_by_choice(
    x: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor,
    given: Experts,
    first: ProductTile | None = None,
    second: ProductTile | None = None,
) -> torch.Tensor:
    """`experts.run_experts` for a few tokens: two kernels. first, second: tiles of gate and up, and of down."""
    (tokens, hidden), k = x.shape, ids.shape[1]
    gate_up, down = packed_parts(given)
    ff, ahead = down.shape[2], dependent_launch(x.device)
    first, second = first or choice_tile(), second or choice_tile()
    between = torch.empty(tokens * k, ff, dtype=x.dtype, device=x.device)
    _products(x, gate_up, given.gate_up_bias, between, ids, first, k, ahead, given)
    parts = torch.empty(tokens * k, hidden, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(hidden, second.block_n)
    counters = _counters(x.device, down.q.data_ptr(), max(tokens, FEW_TOKENS) * tiles)
    packed_down_kernel[(tiles, tokens * k)](
        between, down.q, down.scale, given.down_bias, parts, y, ids, shares, counters, hidden, CHOICES=k, K=ff,
        ROWS=second.rows, BLOCK_N=second.block_n, STAGES=second.stages, POLICY=_policy(second),
        PREFETCH=second.prefetch, FAST=_fast(x), **exact_options(second.warps, ahead),
    )  # fmt: skip
    return y


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
    y = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    columns = min(_COLUMNS, triton.next_power_of_2(hidden))
    combine_kernel[(tokens, triton.cdiv(hidden, columns))](
        parts, ids, shares, y, hidden, CHOICES=k, BLOCK=columns, **exact_options(4, ahead)
    )
    return y


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
    chosen: ExpertLists | torch.Tensor,
    tile: ProductTile,
    choices: int,
    ahead: bool,
    gate: Experts | None,
) -> None:
    """One of the two products. chosen: lists, or ids where choices go one by one. choices: how many share a row of x.
    gate: whose activation follows, None for down, in front of which another kernel has waited since the lists were
    made."""
    n, order, blocks, ids = y.shape[1], None, None, None
    if isinstance(chosen, ExpertLists):
        order, blocks = chosen.order, chosen.blocks
    else:
        ids = chosen
    act, alpha, limit = (gate.act, gate.alpha, gate.limit) if gate else ("none", 0.0, 0.0)
    across = triton.cdiv(n if gate is None else 2 * n, tile.block_n)
    packed_experts_kernel[(across, len(y) if blocks is None else len(blocks))](
        x, weight.q, weight.scale, bias, y, order, blocks, ids, x.stride(0), n, alpha, limit, CHOICES=choices,
        K=weight.cols, ROWS=tile.rows, BLOCK_N=tile.block_n, STAGES=tile.stages, ACT=act, POLICY=_policy(tile),
        PREFETCH=tile.prefetch, EARLY=gate is None, FAST=_fast(x), **exact_options(tile.warps, ahead),
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
