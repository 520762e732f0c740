"""The weights of a layer with experts: router, experts, shared MLP, in both formats."""

from __future__ import annotations

from tokenspeed.layers.moe import Moe
from tokenspeed.models.table import Table
from tokenspeed.weights.spec import Source, WeightSpec

STACKED = "mlp.experts."
"""Where a checkpoint of transformers' own layout has gate_up_proj [experts, 2 ff, d] and down_proj [experts, d, ff]."""


def moe_weights(t: Table, moe: Moe, ours: str, hf: str, gguf: str) -> None:
    """Everything of one layer. ours, hf, gguf: what its names begin with."""
    names, hidden = t.cfg.expert_names, t.cfg.hidden_size
    block = f"{hf}{names.block}."
    router = (block + names.router, gguf + "ffn_gate_inp")
    t.plain(ours + "router", moe.num_experts, hidden, *router, "router", bias=moe.biases)
    if moe.correction:
        correction = ([Source(name, moe.num_experts)] for name in (block + names.correction, gguf + "exp_probs_b.bias"))
        t.vector(ours + "router_correction", *correction)
    if names.turned:
        _turned_experts(t, moe, ours, block + "experts.", gguf)
    else:
        _experts(t, moe, ours, block + "experts.", hf + STACKED, gguf)
    if moe.shared_ff_size:
        _shared(t, moe.shared_ff_size, ours, block + "shared_experts.", gguf)


def _experts(t: Table, moe: Moe, ours: str, hf: str, stacked: str, gguf: str) -> None:
    """A tensor for each part of each expert."""
    count, ff, hidden = moe.num_experts, moe.ff_size, t.cfg.hidden_size
    gate, up, down = t.cfg.expert_names.parts
    pairs = [Source(f"{hf}{e}.{part}.weight", ff) for e in range(count) for part in (gate, up)]
    downs = [Source(f"{hf}{e}.{down}.weight", hidden) for e in range(count)]
    for name, shape, single, in_gguf in (
        ("gate_up", (count, 2 * ff, hidden), pairs, _gguf_pairs(moe, hidden, gguf)),
        ("down", (count, hidden, ff), downs, _gguf_down(moe, hidden, gguf)),
    ):
        whole = (Source(f"{stacked}{name}_proj", shape[0] * shape[1], shape=shape),)
        t.table.add(WeightSpec(f"{ours}experts_{name}", shape, "experts", tuple(single), in_gguf, whole))


def _turned_experts(t: Table, moe: Moe, ours: str, hf: str, gguf: str) -> None:
    """One tensor for all experts' gate and up columns, which come by turns, and one for down; with biases."""
    count, ff, hidden = moe.num_experts, moe.ff_size, t.cfg.hidden_size
    rows = count * 2 * ff
    pairs = Source(f"{hf}gate_up_proj", rows, "unpermute_rope", count, shape=(count, hidden, 2 * ff), transposed=True)
    down = Source(f"{hf}down_proj", count * hidden, shape=(count, ff, hidden), transposed=True)
    biases = {
        "gate_up": Source(f"{hf}gate_up_proj_bias", rows, "unpermute_rope", count, shape=(count, 2 * ff)),
        "down": Source(f"{hf}down_proj_bias", count * hidden, shape=(count, hidden)),
    }
    for name, shape, source, in_gguf, gguf_bias in (
        ("gate_up", (count, 2 * ff, hidden), pairs, _gguf_pairs(moe, hidden, gguf), _gguf_pair_biases(moe, gguf)),
        ("down", (count, hidden, ff), down, _gguf_down(moe, hidden, gguf), _gguf_down_bias(moe, hidden, gguf)),
    ):
        made_up = t.cfg.expert_format
        t.table.add(WeightSpec(f"{ours}experts_{name}", shape, "experts", (source,), in_gguf, dummy_format=made_up))
        bias = WeightSpec(f"{ours}experts_{name}_bias", shape[:2], "vector", (biases[name],), gguf_bias)
        t.table.add(bias)


def _gguf_pairs(moe: Moe, hidden: int, gguf: str) -> tuple[Source, ...]:
    """Of each expert its gate rows and its up rows, which lie in two tensors."""
    ff, shape = moe.ff_size, (moe.num_experts, moe.ff_size, hidden)
    return tuple(
        Source(f"{gguf}ffn_{part}_exps.weight", ff, first=e * ff, shape=shape)
        for e in range(moe.num_experts)
        for part in ("gate", "up")
    )


def _gguf_pair_biases(moe: Moe, gguf: str) -> tuple[Source, ...]:
    ff, shape = moe.ff_size, (moe.num_experts, moe.ff_size)
    return tuple(
        Source(f"{gguf}ffn_{part}_exps.bias", ff, first=e * ff, shape=shape)
        for e in range(moe.num_experts)
        for part in ("gate", "up")
    )


def _gguf_down(moe: Moe, hidden: int, gguf: str) -> tuple[Source, ...]:
    shape = (moe.num_experts, hidden, moe.ff_size)
    return (Source(f"{gguf}ffn_down_exps.weight", moe.num_experts * hidden, shape=shape),)


def _gguf_down_bias(moe: Moe, hidden: int, gguf: str) -> tuple[Source, ...]:
    return (Source(f"{gguf}ffn_down_exps.bias", moe.num_experts * hidden, shape=(moe.num_experts, hidden)),)


def _shared(t: Table, ff: int, ours: str, hf: str, gguf: str) -> None:
    hidden = t.cfg.hidden_size
    t.matrix(
        ours + "shared_gate_up",
        hidden,
        [Source(f"{hf}{part}_proj.weight", ff) for part in ("gate", "up")],
        [Source(f"{gguf}ffn_{part}_shexp.weight", ff) for part in ("gate", "up")],
    )
    t.plain(ours + "shared_down", hidden, ff, f"{hf}down_proj", f"{gguf}ffn_down_shexp")
