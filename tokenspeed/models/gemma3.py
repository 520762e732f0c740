"""Gemma 3 text models: sandwich norms, windowed layers with their own rope base, tied and scaled embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.layers.attention import attention_block
from tokenspeed.layers.decoder import decoder
from tokenspeed.layers.mlp import gated_mlp
from tokenspeed.models.dense import (
    SANDWICH_NORMS,
    DenseConfig,
    Family,
    GGUFConfig,
    gguf_config,
    hf_config,
    hf_windows,
    need,
    refuse_other,
    refuse_set,
    size,
)
from tokenspeed.ops.rope import Rope, rope_from_hf
from tokenspeed.program.recorder import Recorder, Scope, Value

SLIDING_THETA = 10000.0
"""RoPE base of windowed layers; implied by the architecture where a file does not say it."""
PATTERN = 6
"""Every sixth layer is full attention, the others are windowed."""


def _variant(hidden: int, scale: float) -> dict[str, Any]:
    return {
        "attention_scale": scale,
        "act": "gelu_tanh",
        "embed_scale": hidden**0.5,
        "qk_norm": True,
        "norms": SANDWICH_NORMS,
        "norm_plus_one": True,
    }


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json of the text model, in the names of transformers 5 (rope_parameters per layer type) and
    before."""
    refuse_set(
        config, "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "attention_bias"
    )
    head_dim, layers = size(config, "head_dim", 256), size(config, "num_hidden_layers")
    windows = hf_windows(config, _kinds(layers, config.get("sliding_window_pattern") or PATTERN))
    refuse_other(config, "hidden_activation", "gelu_pytorch_tanh")
    ropes = config.get("rope_parameters") or {}
    if "full_attention" in ropes:
        full, local = (_typed_rope(ropes, kind, head_dim) for kind in ("full_attention", "sliding_attention"))
    else:
        full = rope_from_hf(float(config.get("rope_theta", 1e6)), head_dim, config.get("rope_scaling"))
        local = Rope(float(config.get("rope_local_base_freq", SLIDING_THETA)), head_dim)
    return hf_config(
        config,
        head_dim=head_dim,
        ropes=tuple(local if window else full for window in windows),
        windows=windows,
        tied=config.get("tie_word_embeddings", True),
        **_variant(need(config, "hidden_size"), (config.get("query_pre_attn_scalar") or 256) ** -0.5),
    )


def _typed_rope(ropes: Mapping[str, Any], kind: str, head_dim: int) -> Rope:
    parameters = need(ropes, kind)
    return rope_from_hf(float(need(parameters, "rope_theta")), head_dim, parameters)


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata; norms in the file already hold the +1."""
    layers, hidden = meta.integer("block_count"), meta.integer("embedding_length")
    head_dim = meta.integer("attention.key_length")
    full = meta.rope(head_dim)
    local = Rope(float(meta.get("rope.freq_base_swa", SLIDING_THETA)), head_dim)
    kinds = _kinds(layers, meta.integer("attention.sliding_window_pattern", PATTERN))
    window = meta.integer("attention.sliding_window")
    # The 27B model scales queries by hidden_size / heads, the others by head_dim; no key in the file tells them apart.
    scale = (hidden / meta.integer("attention.head_count") if layers == 62 else head_dim) ** -0.5
    return gguf_config(
        meta,
        ropes=tuple(local if kind == "sliding_attention" else full for kind in kinds),
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
        **_variant(hidden, scale),
    )


def _kinds(layers: int, pattern: int) -> list[str]:
    return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]


def wire(g: Recorder, cfg: DenseConfig) -> Value:
    """Attention and MLP, each with a norm before it and one after it on the branch. Also that of Gemma 2 and GLM-4."""

    def layer(x: Value, w: Scope, i: int) -> Value:
        attention = attention_block(g, g.norm(x, w.attn_norm, eps=cfg.norm_eps), w, i, cfg.attention(i))
        x = g.add(x, g.norm(attention, w.attn_post_norm, eps=cfg.norm_eps))
        mlp = gated_mlp(g, g.norm(x, w.mlp_norm, eps=cfg.norm_eps), w, cfg.act)
        return g.add(x, g.norm(mlp, w.mlp_post_norm, eps=cfg.norm_eps))

    frame = {"eps": cfg.norm_eps, "embed_scale": cfg.embed_scale, "logit_cap": cfg.logit_cap}
    return decoder(g, layer, num_layers=cfg.num_layers, **frame)


FAMILY = Family("gemma3", ("gemma3_text",), ("gemma3",), from_hf, from_gguf, wire)
