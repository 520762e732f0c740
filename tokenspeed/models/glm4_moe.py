"""GLM-4.5 mixture-of-experts: Llama's wiring with a shared MLP beside the experts; half of each head turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.layers.moe import Moe
from tokenspeed.models import llama
from tokenspeed.models.dense import DenseConfig, Family, GGUFConfig, count, gguf_config, hf_config, refuse_other, size

VARIANT: dict[str, Any] = {"gguf_mlp_norm": "post_attention_norm"}


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json."""
    refuse_other(config, "scoring_func", "sigmoid")
    refuse_other(config, "topk_method", "noaux_tc")
    config = {"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, **config}
    layers, ff = size(config, "num_hidden_layers"), size(config, "moe_intermediate_size", 1408)
    dense, later = count(config, "first_k_dense_replace", 1), count(config, "num_nextn_predict_layers", 0)
    moe = Moe(
        size(config, "n_routed_experts", 128),
        size(config, "num_experts_per_tok", 8),
        ff,
        ff * count(config, "n_shared_experts", 1),
        "sigmoid",
        bool(config.get("norm_topk_prob", True)),
        size(config, "n_group", 1),
        size(config, "topk_group", 1),
        float(config.get("routed_scaling_factor", 1.0)),
        correction=True,
    )
    return hf_config(
        config,
        qkv_bias=bool(config.get("attention_bias")),
        qk_norm=bool(config.get("use_qk_norm")),
        moe=moe,
        sparse=tuple(i >= dense for i in range(layers)),
        later_layers=later,
        **VARIANT,
    )


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata, whose block_count has the layers that predict further tokens."""
    later = meta.integer("nextn_predict_layers", 0)
    layers = meta.integer("block_count") - later
    moe = meta.experts(
        "sigmoid",
        shared_ff_size=meta.integer("expert_feed_forward_length") * meta.integer("expert_shared_count", 1),
        renormalize=bool(meta.get("expert_weights_norm", True)),
        groups=meta.integer("expert_group_count", 1),
        kept_groups=meta.integer("expert_group_used_count", 1),
        scale=float(meta.get("expert_weights_scale", 1.0)),
        correction=True,
    )
    return gguf_config(
        meta,
        num_layers=layers,
        qkv_bias=meta.biases()["qkv_bias"],
        qk_norm="blk.0.attn_q_norm.weight" in meta.tensors,
        moe=moe,
        sparse=meta.sparse(layers),
        later_layers=later,
        **VARIANT,
    )


FAMILY = Family("glm4_moe", ("glm4_moe",), ("glm4moe",), from_hf, from_gguf, llama.wire)
