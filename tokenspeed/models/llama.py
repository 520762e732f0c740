"""Llama 2 to 3.3, and what shares its architecture name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.layers.attention import attention_block
from tokenspeed.layers.decoder import decoder
from tokenspeed.layers.moe import feed_forward
from tokenspeed.models.dense import (
    MIXTRAL_EXPERTS,
    DenseConfig,
    Family,
    GGUFConfig,
    gguf_config,
    hf_biases,
    hf_config,
)
from tokenspeed.program.recorder import Recorder, Scope, Value


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json."""
    return hf_config(config, **hf_biases(config))


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata; its converter interleaves the rows of each Q and K head. Mixtral's files have experts."""
    experts: dict[str, Any] = {}
    if meta.integer("expert_count", 0):
        sparse = meta.sparse(meta.integer("block_count"))
        experts = {"moe": meta.experts("softmax"), "sparse": sparse, "expert_names": MIXTRAL_EXPERTS}
    return gguf_config(meta, gguf_permuted=True, **experts, **meta.biases())


def wire(g: Recorder, cfg: DenseConfig) -> Value:
    """Pre-norm attention and MLP, or experts, on a plain residual. Also the wiring of families that only add optional
    weights."""

    def layer(x: Value, w: Scope, i: int) -> Value:
        attention = attention_block(g, g.norm(x, w.attn_norm, eps=cfg.norm_eps), w, i, cfg.attention(i))
        x = g.add(x, attention)
        return g.add(x, feed_forward(g, g.norm(x, w.mlp_norm, eps=cfg.norm_eps), w, cfg.act, cfg.moe))

    return decoder(g, layer, num_layers=cfg.num_layers, eps=cfg.norm_eps, embed_scale=cfg.embed_scale)


FAMILY = Family("llama", ("llama",), ("llama",), from_hf, from_gguf, wire)
