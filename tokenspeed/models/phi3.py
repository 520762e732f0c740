"""Phi-3, 3.5 and 4: Llama's wiring; qkv and gate/up are one tensor each; partial rotation, LongRoPE, a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.models import llama
from tokenspeed.models.dense import DenseConfig, Family, GGUFConfig, gguf_config, hf_config, size
from tokenspeed.ops.rope import rope_kind

FUSED = ("qkv", "gate_up")


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json. Old files call LongRoPE "yarn"."""
    for key in ("rope_parameters", "rope_scaling"):
        scaling = config.get(key)
        if scaling and rope_kind(scaling) == "yarn":
            config = {**config, key: {**scaling, "rope_type": "longrope"}}
    layers = size(config, "num_hidden_layers")
    window = size(config, "sliding_window") if config.get("sliding_window") is not None else 0
    eps = config.get("rms_norm_eps", 1e-5)
    return hf_config(config, windows=(window,) * layers, norm_eps=eps, fused=FUSED)


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata; a window of 0 is none."""
    window = meta.integer("attention.sliding_window", 0)
    return gguf_config(meta, windows=(window,) * meta.integer("block_count"), fused=FUSED)


FAMILY = Family("phi3", ("phi3",), ("phi3",), from_hf, from_gguf, llama.wire)
