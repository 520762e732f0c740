"""GLM-4 dense: Gemma 3's wiring; half of each head turns, in pairs side by side; gate/up is one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.models import gemma3
from tokenspeed.models.dense import DenseConfig, Family, GGUFConfig, NormNames, gguf_config, hf_config, size

VARIANT: dict[str, Any] = {
    "norms": NormNames("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    "fused": ("gate_up",),
    "interleaved": True,
}


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json."""
    config = {"partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7, **config}
    bias = bool(config.get("attention_bias", True))
    return hf_config(config, head_dim=size(config, "head_dim", 128), qkv_bias=bias, **VARIANT)


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata."""
    return gguf_config(meta, qkv_bias=meta.biases()["qkv_bias"], **VARIANT)


FAMILY = Family("glm4", ("glm4",), ("glm4",), from_hf, from_gguf, gemma3.wire)
