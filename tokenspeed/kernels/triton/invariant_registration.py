"""Attention and its writes where a row must have the same bits in every batch (`Situation.batch_invariant`)."""

from __future__ import annotations

from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.kernels.triton.attention_registration import DTYPES, Inputs, Tensors, run_rope_write
from tokenspeed.kernels.triton.attention_tiles import MAX_GROUP, MAX_HEAD_DIM
from tokenspeed.kernels.triton.invariant_attention import invariant_attention
from tokenspeed.kernels.triton.launch import dependent_launch
from tokenspeed.kernels.triton.paged import heads_of, paged_layer
from tokenspeed.kernels.triton.view import PagedView, RecordView
from tokenspeed.ops.definitions import Operands


def run_attention(view: PagedView, record: RecordView, inputs: Inputs, weights: Inputs) -> Tensors:
    """attention of any bucket; every token lies in the view's items. weights: none, or sinks float32 [heads]."""
    assert view.items is not None
    paged = paged_layer(view, record.attrs["layer"])
    sinks = weights[0] if weights else None
    return (invariant_attention(inputs[0], paged, view.items, heads_of(record.attrs), sinks),)


def run_write(view: PagedView, record: RecordView, inputs: Inputs, weights: Inputs) -> Tensors:
    """rope_write and qk_norm_rope_write, as one kernel for every number of tokens."""
    return run_rope_write(view, record, inputs, weights, pdl=dependent_launch(inputs[0].device))


def _takes(operands: Operands, situation: Situation) -> bool:
    return situation.batch_invariant and situation.device == "cuda" and situation.dtype in DTYPES


def _takes_attention(operands: Operands, situation: Situation) -> bool:
    attrs = operands.attrs
    fits = attrs["head_dim"] <= MAX_HEAD_DIM and attrs["heads"] <= MAX_GROUP * attrs["kv_heads"]
    return fits and _takes(operands, situation)


def register(registry: Registry) -> None:
    """Add attention and the fused writes."""
    for op, run, takes in (
        ("attention", run_attention, _takes_attention),
        ("rope_write", run_write, _takes),
        ("qk_norm_rope_write", run_write, _takes),
    ):
        registry.add(Implementation(f"invariant.{op}", op, "triton", run, takes, priority=10, invariant=True))
