"""Routers and experts on a GPU as implementations. A `run` is called as run(view, record, inputs, weights)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.kernels.triton.dense import DTYPES, JOINS, PRIORITY, Node, outputs_of, prologue_of
from tokenspeed.kernels.triton.expert_operands import ACTS, ExpertMatrix, Experts
from tokenspeed.kernels.triton.expert_tiles import ProductTile, packed_tile_of, tile_of
from tokenspeed.kernels.triton.experts import run_experts
from tokenspeed.kernels.triton.operands import Matrix, matrix_parts, scale_block_of
from tokenspeed.kernels.triton.route import MOST_EXPERTS, Noise, route
from tokenspeed.kernels.triton.router import FEW_TOKENS, MOST_COLUMNS, Routed, route_rows
from tokenspeed.kernels.triton.view import PagedView, RecordView
from tokenspeed.ops.definitions import Operands
from tokenspeed.quantization.fp8 import FORMAT as FP8_FORMAT
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts
from tokenspeed.quantization.narrow import FORMATS

NARROW = frozenset(FORMATS.values())
ROUTERS = tuple(f"{op}_route" for op in ("norm", *JOINS))
SAME_ROWS = 64
"""Choices of a block where a row must have the same bits in every batch."""
Outputs = tuple[torch.Tensor, ...]
RouteRows = Callable[..., Routed]
"""As `router.route_rows`."""
Takes = Callable[[Operands, Situation], bool]


def register(registry: Registry, *, fp8: bool = True) -> None:
    """Add `route` and `experts` of backend "triton". fp8: as `dense.register`."""

    def takes(operands: Operands, situation: Situation) -> bool:
        return takes_experts(operands, situation, fp8)

    def takes_apart(operands: Operands, situation: Situation) -> bool:
        return situation.batch_invariant and takes(operands, situation)

    for op in ROUTERS:
        registry.add(Implementation(f"triton.{op}", op, "triton", run_router, takes_router, PRIORITY))
    same = partial(run_chosen, rows=SAME_ROWS)
    registry.add(Implementation("triton.route", "route", "triton", run_route, _takes_route, PRIORITY, invariant=True))
    registry.add(Implementation("invariant.experts", "experts", "triton", same, takes_apart, PRIORITY, invariant=True))
    registry.add(Implementation("triton.experts", "experts", "triton", run_chosen, takes, PRIORITY))


def takes_experts(operands: Operands, situation: Situation, fp8: bool = True) -> bool:
    """Whether `run_experts` runs such. fp8: as `dense.register`."""
    formats = {situation.formats.get(name, ()) for name in operands.weights[:2]}
    narrow = {fmt for each in formats for fmt in each if fmt in NARROW}
    one_format = not narrow or (len(formats) == 1 and (fp8 or FP8_FORMAT not in narrow))
    return one_format and operands.attrs["act"] in ACTS and _fits(operands.weight_shapes[0][0], situation)


def run_route(
    view: PagedView, record: RecordView, inputs: Sequence[torch.Tensor], weights: Sequence[Matrix]
) -> Outputs:
    """route: ids and weights. Tokens of padding choose nobody, so that no expert is read for them."""
    return route(inputs[0], _tensor(weights[0]) if weights else None, record.attrs, view.slots)


def run_router(
    view: PagedView,
    record: Node,
    inputs: Sequence[torch.Tensor],
    weights: Sequence[Matrix],
    rows: RouteRows = route_rows,
) -> Outputs:
    """norm_route and its like, of a few tokens: the joined and the normed row, ids and weights."""
    return router_outputs(view, record, inputs, weights, None, rows)


def router_outputs(
    view: PagedView,
    record: Node,
    inputs: Sequence[torch.Tensor],
    weights: Sequence[Matrix],
    noise: Noise | None,
    rows: RouteRows = route_rows,
) -> Outputs:
    """The same, by noise where there is any."""
    values, named = dict(zip(record.inputs, inputs, strict=True)), dict(zip(record.weights, weights, strict=True))
    parts = list(record.plain())
    linear, choice = parts[-2:]
    norm = next(part for part in reversed(parts) if part.op == "norm")
    x, prologue = prologue_of(parts, values, named)
    assert prologue is not None
    matrix, *bias = (_tensor(named[name]) for name in linear.weights)
    correction = _tensor(named[choice.weights[0]]) if choice.weights else None
    found = rows(x, prologue, matrix, bias[0] if bias else None, correction, choice.attrs, view.slots, noise)
    made = dict(zip(choice.outputs, (found.ids, found.shares), strict=True)) | {norm.outputs[0]: found.normed}
    return outputs_of(record, parts, made, found.joined)


def run_chosen(
    view: PagedView,
    record: RecordView,
    inputs: Sequence[torch.Tensor],
    weights: Sequence[Matrix | Mxfp4Experts],
    rows: int | None = None,
    run: Callable[..., torch.Tensor] = run_experts,
) -> Outputs:
    """experts. rows: choices of a block, whatever the number of tokens; by default what suits that. run: otherwise, as
    `run_experts`."""
    gate_up, down = map(_experts, weights[:2])
    biases, attrs = weights[2:], record.attrs
    up_bias, down_bias = map(_tensor, biases) if biases else (None, None)
    given = Experts(gate_up, down, attrs["act"], up_bias, down_bias, attrs["alpha"], attrs["limit"])
    x, ids, shares = inputs
    if rows is None:
        return (run(x, ids, shares, given),)
    return (run_experts(x, ids, shares, given, product_tile_of(rows, gate_up)),)


def _tensor(weight: Matrix | Mxfp4Experts) -> torch.Tensor:
    assert isinstance(weight, torch.Tensor)
    return weight


def product_tile_of(rows: int, weight: ExpertMatrix) -> ProductTile:
    """The tile for blocks of so many choices, by the weights' format."""
    if isinstance(weight, Mxfp4Experts):
        return packed_tile_of(rows)
    return tile_of(rows, matrix_parts(weight)[0].element_size(), scale_block_of(weight))


def _experts(weight: Matrix | Mxfp4Experts) -> ExpertMatrix:
    assert isinstance(weight, ExpertMatrix)
    return weight


def takes_router(operands: Operands, situation: Situation, most: int | None = None) -> bool:
    """Whether a router with its norm is one kernel: of so many tokens (None: FEW_TOKENS) and plain weights."""
    stored = zip(operands.weights, operands.weight_shapes, strict=True)
    name, (experts, hidden) = next((name, shape) for name, shape in stored if len(shape) > 1)
    plain = FP8_FORMAT not in situation.formats.get(name, ())
    few = situation.tokens <= (most or FEW_TOKENS) and not situation.batch_invariant
    return few and plain and hidden <= MOST_COLUMNS and _fits(experts, situation)


def _takes_route(operands: Operands, situation: Situation) -> bool:
    return _fits(int(operands.inputs[0][-1]), situation)


def _fits(experts: int, situation: Situation) -> bool:
    return experts <= MOST_EXPERTS and situation.device == "cuda" and situation.dtype in DTYPES
