"""The chosen experts of each token: gate and up, activation, down, weighted sum, for any number of tokens and formats.

A few tokens whose experts are mostly distinct: choice by choice (`expert_gemv`). Else choices are listed by expert on
the device and multiplied in blocks (`expert_lists`, `expert_products`). Nothing waits for the device, grids depend on
shapes alone.
"""

from __future__ import annotations

import torch
import triton

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.triton import norm as row_kernels
from tokenspeed.kernels.triton.expert_gemv import down_kernel, gate_up_kernel
from tokenspeed.kernels.triton.expert_lists import ExpertLists, expert_lists
from tokenspeed.kernels.triton.expert_operands import ACTS, ExpertMatrix, Experts
from tokenspeed.kernels.triton.expert_products import grouped_kernel
from tokenspeed.kernels.triton.expert_sums import combine
from tokenspeed.kernels.triton.expert_tiles import ProductTile, by_choice, down_tile, gate_up_tile, product_tile
from tokenspeed.kernels.triton.launch import dependent_launch, exact_options, options
from tokenspeed.kernels.triton.operands import Multiplied, Rows, matrix_parts, scale_block_of
from tokenspeed.kernels.triton.packed_experts import packed_by_choice, packed_in_blocks
from tokenspeed.kernels.triton.tiles import GemvTile
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts

MOST_TOKENS = 4096
"""Tokens that are worked on together: what lies between gate and down has a row for each choice."""
AHEAD_TOKENS = 256
"""Kernels are launched ahead up to so many tokens."""


def run_experts(
    x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, given: Experts, tile: ProductTile | None = None
) -> torch.Tensor:
    """The experts of x [T, hidden], weighted and added up: [T, hidden] in the dtype of x.

    ids: int32 [T, k], distinct in a row or -1 in all of it, whose outcome is zeros; shares: float32 [T, k]. tile: for
    products in blocks whatever the number of tokens; a row then has the same bits in every batch. Raises
    UnsupportedError for weights that do not fit.
    """
    _check(x, given)
    (tokens, k), packed = ids.shape, isinstance(given.down, Mxfp4Experts)
    if tile is None and by_choice(tokens, given.number, k, 0 if packed else scale_block_of(plain(given.down))):
        return (packed_by_choice if packed else experts_by_choice)(x, ids, shares, given)
    in_blocks = packed_in_blocks if packed else experts_in_blocks
    if tokens <= MOST_TOKENS:
        return in_blocks(x, ids, shares, given, tile)
    pieces = zip(x.split(MOST_TOKENS), ids.split(MOST_TOKENS), shares.split(MOST_TOKENS), strict=True)
    return torch.cat([in_blocks(some, theirs, weights, given, tile) for some, theirs, weights in pieces])


def experts_by_choice(
    x: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor,
    given: Experts,
    first: GemvTile | None = None,
    second: GemvTile | None = None,
) -> torch.Tensor:
    """`run_experts` for a few tokens; weights plain or with a scale per row. first, second: tiles of gate and up, and
    of down."""
    (tokens, hidden), k = x.shape, ids.shape[1]
    (gate_up, up_scale), (down, down_scale) = (matrix_parts(plain(each)) for each in (given.gate_up, given.down))
    ff, ahead = down.shape[2], dependent_launch(x.device)
    halves = ahead and up_scale is not None
    first, second = first or gate_up_tile(tokens * k, ff, hidden), second or down_tile(tokens, hidden, ff)
    between = torch.empty(tokens * k, ff, dtype=x.dtype, device=x.device)
    gate_up_kernel[(triton.cdiv(2 * ff, first.block_n), tokens * k)](
        x, ids, gate_up, up_scale, given.gate_up_bias, between, x.stride(0), ff, given.alpha, given.limit, CHOICES=k,
        K=hidden, BLOCK_N=first.block_n, BLOCK_K=first.block_k, ACT=given.act, HALVES=halves,
        **options(first.warps, ahead),
    )  # fmt: skip
    y = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    down_kernel[(triton.cdiv(hidden, second.block_n), tokens)](
        between, ids, shares, down, down_scale, given.down_bias, y, hidden, CHOICES=k, K=ff, BLOCK_N=second.block_n,
        BLOCK_K=second.block_k, HALVES=halves, **options(second.warps, ahead),
    )  # fmt: skip
    return y


def experts_in_blocks(
    x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, given: Experts, tile: ProductTile | None = None
) -> torch.Tensor:
    """`run_experts` for any number of tokens."""
    (tokens, hidden), k, ff = x.shape, ids.shape[1], given.down.shape[2]
    gate_up, down = plain(given.gate_up), plain(given.down)
    item, block = matrix_parts(gate_up)[0].element_size(), scale_block_of(gate_up)
    tile = tile or product_tile(tokens, given.number, k, item, block)
    ahead = tokens <= AHEAD_TOKENS and dependent_launch(x.device)
    rows = _quantized(Rows(x), gate_up)
    lists = expert_lists(ids, given.number, tile.rows, ahead)
    between = torch.empty(tokens * k, ff, dtype=x.dtype, device=x.device)
    _products(rows, gate_up, given.gate_up_bias, between, lists, tile, k, ahead, given)
    parts = torch.empty(tokens * k, hidden, dtype=x.dtype, device=x.device)
    _products(_quantized(Rows(between), down), down, given.down_bias, parts, lists, tile, 1, ahead, None)
    return combine(parts, ids, shares, x.dtype, ahead)


def _products(
    x: Rows,
    weight: Multiplied,
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
    (matrix, scale), n = matrix_parts(weight), y.shape[1]
    act, alpha, limit = (gate.act, gate.alpha, gate.limit) if gate else ("none", 0.0, 0.0)
    grid = (triton.cdiv(n if gate is None else 2 * n, tile.block_n), lists.blocks.shape[0])
    grouped_kernel[grid](
        x.values, x.scale, matrix, scale, bias, y, lists.order, lists.blocks, x.values.stride(0), n, alpha, limit,
        CHOICES=choices, K=matrix.shape[2], ROWS=tile.rows, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        STAGES=tile.stages, SCALE_BLOCK=scale_block_of(weight), ACT=act,
        POLICY="evict_first" if tile.stream else "", PREFETCH=tile.prefetch, EARLY=gate is None,
        **exact_options(tile.warps, ahead),
    )  # fmt: skip


def _quantized(rows: Rows, weight: Multiplied) -> Rows:
    return row_kernels.norm_rows(rows.values, None, quantize=True)[0] if isinstance(weight, Fp8Weight) else rows


def plain(weight: ExpertMatrix) -> Multiplied:
    """One that is not packed."""
    assert not isinstance(weight, Mxfp4Experts)
    return weight


def _check(x: torch.Tensor, given: Experts) -> None:
    """Raise UnsupportedError for weights that the kernels cannot read."""
    gate_up, down = given.gate_up, given.down
    experts, hidden, ff = down.shape
    fit = gate_up.shape == (experts, 2 * ff, hidden) and x.shape[1] == hidden and x.stride(1) == 1
    formats = _format(gate_up), _format(down)
    if not (fit and formats[0] == formats[1] and _whole(gate_up) and _whole(down) and given.act in ACTS):
        raise UnsupportedError(
            f"experts of {x.shape[1]} columns with {formats[0]} weights {tuple(gate_up.shape)} and {formats[1]} "
            f"{tuple(down.shape)} and activation {given.act} (supported: [E, 2 F, H] and [E, H, F] of one format, "
            f"contiguous, with {', '.join(ACTS)})"
        )


def _format(weight: ExpertMatrix) -> str:
    if isinstance(weight, Mxfp4Experts):
        return "mxfp4"
    block = scale_block_of(weight)
    return str(matrix_parts(weight)[0].dtype) + (f" with scales of {block} x {block}" if block else "")


def _whole(weight: ExpertMatrix) -> bool:
    if isinstance(weight, Mxfp4Experts):
        return weight.q.is_contiguous() and weight.scale.is_contiguous()
    return matrix_parts(weight)[0].is_contiguous()
