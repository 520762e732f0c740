"""Gemma 2: Gemma 3's wiring without norms of queries and keys; soft caps of scores and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.models import gemma3
from tokenspeed.models.dense import (
    SANDWICH_NORMS,
    DenseConfig,
    Family,
    GGUFConfig,
    gguf_config,
    hf_config,
    hf_windows,
    refuse_other,
    refuse_set,
    size,
)

SCORE_CAP, LOGIT_CAP = 50.0, 30.0
"""Where a file names none; null in config.json is none."""
WINDOW = 4096
LAYERS_27B = 46


def _variant(hidden: int, scale: float, caps: tuple[float, float]) -> dict[str, Any]:
    return {
        "attention_scale": scale,
        "act": "gelu_tanh",
        "embed_scale": hidden**0.5,
        "norms": SANDWICH_NORMS,
        "norm_plus_one": True,
        "score_cap": caps[0],
        "logit_cap": caps[1],
    }


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json."""
    refuse_set(config, "use_bidirectional_attention", "attention_bias")
    refuse_other(config, "hidden_activation", "gelu_pytorch_tanh")
    caps = {"attn_logit_softcapping": SCORE_CAP, "final_logit_softcapping": LOGIT_CAP}
    config = {"sliding_window": WINDOW, **caps, **config}
    scores, logits = (float(config[key] or 0.0) for key in caps)
    return hf_config(
        config,
        head_dim=size(config, "head_dim", 256),
        windows=hf_windows(config, _kinds(size(config, "num_hidden_layers"))),
        tied=config.get("tie_word_embeddings", True),
        **_variant(size(config, "hidden_size"), size(config, "query_pre_attn_scalar", 256) ** -0.5, (scores, logits)),
    )


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata; norms in the file already hold the +1."""
    layers, hidden = meta.integer("block_count"), meta.integer("embedding_length")
    window = meta.integer("attention.sliding_window", WINDOW)
    caps = float(meta.get("attn_logit_softcapping", SCORE_CAP)), float(meta.get("final_logit_softcapping", LOGIT_CAP))
    # The 27B model scales queries by hidden_size / heads, the others by head_dim; no key in the file tells them apart.
    head_dim, wide = meta.integer("attention.key_length"), hidden / meta.integer("attention.head_count")
    scale = (wide if layers == LAYERS_27B else head_dim) ** -0.5
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in _kinds(layers))
    return gguf_config(meta, windows=windows, **_variant(hidden, scale, caps))


def _kinds(layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]


FAMILY = Family("gemma2", ("gemma2",), ("gemma2",), from_hf, from_gguf, gemma3.wire)
