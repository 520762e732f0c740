"""Paged attention and KV writes on a GPU: what runs them, and what they take.

A `run` is called as run(view, record, inputs, weights) with a `PagedView` and gives the record's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.kernels.triton.attention_tiles import MAX_GROUP, MAX_HEAD_DIM, decode_tile, prefill_tile
from tokenspeed.kernels.triton.decode_attention import decode_attention
from tokenspeed.kernels.triton.launch import small_step
from tokenspeed.kernels.triton.paged import Heads, PagedLayer, heads_of, paged_layer
from tokenspeed.kernels.triton.prefill_attention import prefill_attention
from tokenspeed.kernels.triton.rope_write import HeadNorm, rope_write
from tokenspeed.kernels.triton.view import PagedView, RecordView
from tokenspeed.ops.definitions import UNSCALED, KvScale, Operands
from tokenspeed.ops.rope import Rope

Tensors = tuple[torch.Tensor, ...]
Inputs = Sequence[torch.Tensor]
AttendItems = Callable[[torch.Tensor, PagedLayer, torch.Tensor, Heads, torch.Tensor | None], torch.Tensor]
"""Attention of work items, as `prefill_attention`: queries, pages, items, heads, sinks."""
MOST_DECODE_TOKENS = 64
"""Buckets up to this hold the decode kernel alone, which takes every token as a sequence of its own."""
MOST_EARLY_TOKENS = 4
"""Up to here decoding asks for keys before the kernel in front has ended (8B, 1024 tokens: 7.2 for 8.7 us)."""
DTYPES = ("bfloat16", "float16", "float32")


def run_decode(view: PagedView, record: RecordView, inputs: Inputs, weights: Inputs) -> Tensors:
    """attention of a bucket up to MOST_DECODE_TOKENS. weights: none, or sinks float32 [heads]."""
    heads, paged = heads_of(record.attrs), paged_layer(view, record.attrs["layer"])
    return (_decode(inputs[0], paged, heads, _sinks(weights), None, None),)


def by_tiles(
    q: torch.Tensor, paged: PagedLayer, items: torch.Tensor, heads: Heads, sinks: torch.Tensor | None
) -> torch.Tensor:
    """`prefill_attention` with the table's tile."""
    return prefill_attention(q, paged, items, heads, prefill_tile(heads.head_dim, q.element_size()), sinks)


def run_prefill(
    view: PagedView, record: RecordView, inputs: Inputs, weights: Inputs, attend: AttendItems = by_tiles
) -> Tensors:
    """attention of a larger bucket: the view's items, then its decode rows where it has them; without items every token
    is a sequence of its own."""
    if view.items is None:
        return run_decode(view, record, inputs, weights)
    heads, paged, q = heads_of(record.attrs), paged_layer(view, record.attrs["layer"]), inputs[0]
    out = attend(q, paged, view.items, heads, _sinks(weights))
    if view.decode_rows is not None:
        _decode(q, paged, heads, _sinks(weights), view.decode_rows, out)
    return (out,)


def run_attention(
    view: PagedView, record: RecordView, inputs: Inputs, weights: Inputs, attend: AttendItems = by_tiles
) -> Tensors:
    """attention of a bucket of any size."""
    if inputs[0].shape[0] <= MOST_DECODE_TOKENS:
        return run_decode(view, record, inputs, weights)
    return run_prefill(view, record, inputs, weights, attend)


def _sinks(weights: Inputs) -> torch.Tensor | None:
    return weights[0] if weights else None


def _decode(
    q: torch.Tensor,
    paged: PagedLayer,
    heads: Heads,
    sinks: torch.Tensor | None,
    rows: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    sequences = q.shape[0] if rows is None else rows.shape[0]
    widest = max(q.element_size(), paged.kv.element_size())
    tile = decode_tile(sequences, heads.kv_heads, heads.head_dim, widest)
    # The kernel in front lets this one start after its own wait, so what came before it is there. With more sequences
    # the keys of others are on their way meanwhile, and nothing is gained.
    early = q.shape[0] <= MOST_EARLY_TOKENS and small_step(q)
    return decode_attention(q, paged, heads, tile, sinks, rows, out, early=early, pdl=small_step(q))


def run_rope_write(
    view: PagedView, record: RecordView, inputs: Inputs, weights: Inputs, pdl: bool | None = None
) -> Tensors:
    """rope_write and qk_norm_rope_write: inputs q, k, v; weights none, or the norms of q and of k. pdl: whether the
    kernel is launched ahead; by default in small steps."""
    q, k, v = inputs
    rope, norms, layer = rotation_of(record, weights)
    paged, ahead = paged_layer(view, layer), small_step(q) if pdl is None else pdl
    rotated = rope_write(q, k, v, paged, rope, norms, pdl=ahead, kv_scale=kv_scale_of(record))
    return rotated, paged.kv


def kv_scale_of(record: RecordView) -> KvScale:
    """Of the layer that a record writes to."""
    write = next(part for part in record.plain() if part.op == "kv_write")
    return write.attrs.get("kv_scale", UNSCALED)


def rotation_of(record: RecordView, weights: Inputs) -> tuple[Rope, tuple[HeadNorm, HeadNorm] | None, int]:
    """How a record that writes keys turns them, the norms that come before, and the layer."""
    parts = list(record.plain())
    rope = next(part.attrs["rope"] for part in parts if part.op == "rope")
    layer = next(part.attrs["layer"] for part in parts if part.op == "kv_write")
    eps = [part.attrs["eps"] for part in parts if part.op == "norm"]
    return rope, (HeadNorm(weights[0], eps[0]), HeadNorm(weights[1], eps[1])) if eps else None, layer


def _takes(operands: Operands, situation: Situation) -> bool:
    return situation.device == "cuda" and situation.dtype in DTYPES


def _takes_attention(operands: Operands, situation: Situation) -> bool:
    attrs = operands.attrs
    fits = attrs["head_dim"] <= MAX_HEAD_DIM and attrs["heads"] <= MAX_GROUP * attrs["kv_heads"]
    return fits and _takes(operands, situation)


def _takes_decode(operands: Operands, situation: Situation) -> bool:
    return situation.tokens <= MOST_DECODE_TOKENS and _takes_attention(operands, situation)


def _takes_prefill(operands: Operands, situation: Situation) -> bool:
    return situation.tokens > MOST_DECODE_TOKENS and _takes_attention(operands, situation)


def register(registry: Registry) -> None:
    """Add attention and the fused writes."""
    table: tuple[tuple[str, str, Callable[..., Tensors], Callable[[Operands, Situation], bool]], ...] = (
        ("decode", "attention", run_decode, _takes_decode),
        ("prefill", "attention", run_prefill, _takes_prefill),
        ("rope_write", "rope_write", run_rope_write, _takes),
        ("rope_write", "qk_norm_rope_write", run_rope_write, _takes),
    )
    for name, op, run, takes in table:
        registry.add(Implementation(name, op, "triton", run, takes, priority=10))
