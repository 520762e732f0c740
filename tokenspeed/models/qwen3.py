"""Qwen3 dense: Llama's wiring with a norm on each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.models import llama
from tokenspeed.models.dense import DenseConfig, Family, GGUFConfig, gguf_config, hf_config, size


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json."""
    if config.get("attention_bias") or config.get("use_sliding_window"):
        raise UnsupportedError("qwen3 with attention_bias or use_sliding_window is not supported")
    return hf_config(config, head_dim=size(config, "head_dim", 128), qk_norm=True)


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata."""
    return gguf_config(meta, qk_norm=True)


FAMILY = Family("qwen3", ("qwen3",), ("qwen3",), from_hf, from_gguf, llama.wire)
