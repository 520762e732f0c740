"""MiniMax M2 and M2.7: Llama's wiring with experts in every layer, and OLMo 2's norms of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.layers.moe import Moe
from tokenspeed.models import llama
from tokenspeed.models.dense import (
    MIXTRAL_EXPERTS,
    DenseConfig,
    Family,
    GGUFConfig,
    gguf_config,
    hf_config,
    refuse_other,
    refuse_set,
    size,
)

THETA = 5e6
VARIANT: dict[str, Any] = {
    "qk_norm_whole": True,
    "expert_names": MIXTRAL_EXPERTS._replace(correction="e_score_correction_bias"),
}


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json; `rotary_dim` is an older way to say how much of a head turns."""
    _refuse(config)
    head_dim, layers = size(config, "head_dim", 128), size(config, "num_hidden_layers")
    if config.get("rotary_dim") is not None:
        config = {"partial_rotary_factor": size(config, "rotary_dim") / head_dim, **config}
    experts = size(config, "num_local_experts", 256), size(config, "num_experts_per_tok", 8)
    corrected = bool(config.get("use_routing_bias", True))
    return hf_config(
        config,
        THETA,
        head_dim=head_dim,
        moe=Moe(*experts, size(config, "intermediate_size"), score="sigmoid", correction=corrected),
        sparse=(True,) * layers,
        **VARIANT,
    )


def _refuse(config: Mapping[str, Any]) -> None:
    refuse_set(config, "attention_bias", "shared_intermediate_size", "sliding_window")
    refuse_other(config, "scoring_func", "sigmoid")
    refuse_other(config, "qk_norm_type", "per_layer")
    if not config.get("use_qk_norm", True):
        raise UnsupportedError("minimax_m2 without use_qk_norm is not supported")
    if set(config.get("attn_type_list") or [1]) != {1}:
        raise UnsupportedError("attn_type_list with linear attention is not supported (supported: 1 for every layer)")


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata."""
    corrected = "blk.0.exp_probs_b.bias" in meta.tensors
    sparse = (True,) * meta.integer("block_count")
    return gguf_config(meta, moe=meta.experts("sigmoid", correction=corrected), sparse=sparse, **VARIANT)


FAMILY = Family("minimax_m2", ("minimax_m2",), ("minimax-m2",), from_hf, from_gguf, llama.wire)
