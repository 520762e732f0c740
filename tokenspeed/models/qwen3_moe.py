"""Qwen3 mixture-of-experts: Qwen3's attention; experts in the layers that the config does not leave to a plain MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.contracts.errors import FormatError
from tokenspeed.layers.moe import Moe
from tokenspeed.models import llama
from tokenspeed.models.dense import (
    DenseConfig,
    Family,
    GGUFConfig,
    gguf_config,
    hf_biases,
    hf_config,
    refuse_set,
    size,
)


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json, which calls the number of experts num_experts or, of late, num_local_experts."""
    refuse_set(config, "use_sliding_window")
    number = size(config, "num_local_experts", size(config, "num_experts", 128))
    chosen, ff = size(config, "num_experts_per_tok", 8), size(config, "moe_intermediate_size", 768)
    return hf_config(
        config,
        head_dim=size(config, "head_dim", size(config, "hidden_size") // size(config, "num_attention_heads")),
        qk_norm=True,
        moe=Moe(number, chosen, ff, renormalize=bool(config.get("norm_topk_prob", False))),
        sparse=_sparse(config),
        **hf_biases(config) | {"mlp_bias": False},
    )


def _sparse(config: Mapping[str, Any]) -> tuple[bool, ...]:
    layers, step = size(config, "num_hidden_layers"), size(config, "decoder_sparse_step", 1)
    plain = config.get("mlp_only_layers") or []
    if not set(plain) <= set(range(layers)):
        raise FormatError(f"mlp_only_layers must be some of {layers} layers, got {plain}")
    return tuple(i not in plain and (i + 1) % step == 0 for i in range(layers))


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata. They do not say whether weights are renormalised: those of all released models are."""
    sparse = meta.sparse(meta.integer("block_count"))
    return gguf_config(meta, qk_norm=True, moe=meta.experts("softmax"), sparse=sparse, **meta.biases())


FAMILY = Family("qwen3_moe", ("qwen3_moe",), ("qwen3moe",), from_hf, from_gguf, llama.wire)
