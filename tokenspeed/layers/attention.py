"""Attention blocks, as plain ops."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.ops.rope import Rope
from tokenspeed.program.recorder import Recorder, Scope, Value


@dataclass(frozen=True)
class Attention:
    """One layer's grouped-query attention. window 0 is full attention; eps is that of the norms of queries and keys,
    which are per head, or with `whole_norm` of all heads together; score_cap 0 leaves the scores as they are."""

    head_dim: int
    rope: Rope
    scale: float
    window: int
    eps: float
    whole_norm: bool = False
    score_cap: float = 0.0


def attention_block(g: Recorder, x: Value, w: Scope, layer: int, spec: Attention) -> Value:
    """qkv projection, norms of queries and keys where the model has them, rope, paged attention, output projection.

    Weights: qkv [q + 2 kv, d], o [d, q]; optional q_norm, k_norm [head_dim, or q and kv], qkv_bias [q + 2 kv], o_bias,
    sinks [heads].
    """
    qkv = g.linear(x, w.qkv, w.qkv_bias if w.has("qkv_bias") else None)
    q_size = g.shape(w.o)[1]
    kv_size = (g.shape(w.qkv)[0] - q_size) // 2
    q, k, v = g.split(qkv, q_size, kv_size, kv_size)
    if w.has("q_norm"):
        q = g.norm(q, w.q_norm, eps=spec.eps, per_head=not spec.whole_norm)
        k = g.norm(k, w.k_norm, eps=spec.eps, per_head=not spec.whole_norm)
    q, k = g.rope(q, k, spec.rope, head_dim=spec.head_dim)
    sizes = {"head_dim": spec.head_dim, "window": spec.window}
    sinks = w.sinks if w.has("sinks") else None
    attended = g.attention(q, k, v, layer, **sizes, scale=spec.scale, softcap=spec.score_cap, sinks=sinks)
    return g.linear(attended, w.o, w.o_bias if w.has("o_bias") else None)
