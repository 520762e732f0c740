"""gpt-oss: sinks in every layer's softmax, a window in every other layer, biases everywhere, YaRN without rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tokenspeed.layers.moe import Moe
from tokenspeed.models import llama
from tokenspeed.models.dense import (
    DenseConfig,
    ExpertNames,
    Family,
    GGUFConfig,
    gguf_config,
    hf_config,
    hf_windows,
    positive,
    size,
)

THETA = 150000.0
ALPHA, LIMIT = 1.702, 7.0
"""Of the clamped SwiGLU, where a file names none."""
VARIANT: dict[str, Any] = {
    "sinks": True,
    "expert_names": ExpertNames(router="router", turned=True),
    "gguf_mlp_norm": "post_attention_norm",
}


def _moe(moe: Moe, alpha: float = ALPHA, limit: float = LIMIT) -> Moe:
    return replace(moe, score="logits", act="swiglu_clamped", alpha=alpha, limit=limit, biases=True)


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json."""
    config = {"rms_norm_eps": 1e-5, "sliding_window": 128, **config}
    layers, bias = size(config, "num_hidden_layers"), bool(config.get("attention_bias", True))
    experts = size(config, "num_local_experts", 128), size(config, "num_experts_per_tok", 4)
    alpha, limit = (
        positive(config.get(key, value), key) for key, value in (("swiglu_alpha", ALPHA), ("swiglu_limit", LIMIT))
    )
    return hf_config(
        config,
        THETA,
        head_dim=size(config, "head_dim", 64),
        windows=hf_windows(config, _kinds(layers)),
        qkv_bias=bias,
        o_bias=bias,
        moe=_moe(Moe(*experts, size(config, "intermediate_size")), alpha, limit),
        sparse=(True,) * layers,
        expert_format="MXFP4" if config.get("quantization_config") else "BF16",
        **VARIANT,
    )


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata."""
    layers, window = meta.integer("block_count"), meta.integer("attention.sliding_window")
    biases = meta.biases()
    return gguf_config(
        meta,
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in _kinds(layers)),
        ropes=(meta.rope(meta.integer("attention.key_length"), truncate=False),) * layers,
        qkv_bias=biases["qkv_bias"],
        o_bias=biases["o_bias"],
        moe=_moe(meta.experts("logits")),
        sparse=(True,) * layers,
        **VARIANT,
    )


def _kinds(layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]


FAMILY = Family("gpt_oss", ("gpt_oss",), ("gpt-oss",), from_hf, from_gguf, llama.wire)
