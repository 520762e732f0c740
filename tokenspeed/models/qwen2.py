"""Qwen2 and Qwen2.5 dense: Llama's wiring with a bias on the qkv projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.models import llama
from tokenspeed.models.dense import DenseConfig, Family, GGUFConfig, gguf_config, hf_config


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json."""
    if config.get("use_sliding_window"):
        raise UnsupportedError("qwen2 with use_sliding_window is not supported")
    return hf_config(config, qkv_bias=True)


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata."""
    return gguf_config(meta, qkv_bias=True)


FAMILY = Family("qwen2", ("qwen2",), ("qwen2",), from_hf, from_gguf, llama.wire)
