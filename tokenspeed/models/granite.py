"""Granite 3 dense: Llama's wiring with four multipliers.

That of the residual branches, r, costs nothing. The stream is kept divided by r: branches are then added as they are,
and a norm of x / r is the norm of x if its epsilon is divided by r^2. Captured states of the stream are divided by r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.models import llama
from tokenspeed.models.dense import DenseConfig, Family, GGUFConfig, gguf_config, hf_biases, hf_config, positive


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json."""
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    given = (positive(config.get(name, 1.0), name) for name in names)
    return hf_config(config, **hf_biases(config), **_variant(config.get("rms_norm_eps", 1e-6), *given))


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata; its converter interleaves the rows of each Q and K head."""
    names = ("embedding_scale", "residual_scale", "attention.scale", "logit_scale")
    given = (positive(meta.get(name), f"GGUF {name}") for name in names)
    eps = float(meta.get("attention.layer_norm_rms_epsilon"))
    return gguf_config(meta, gguf_permuted=True, **meta.biases(), **_variant(eps, *given))


def _variant(eps: float, embedding: float, residual: float, attention: float, logits: float) -> dict[str, Any]:
    return {
        "norm_eps": eps / residual**2,
        "embed_scale": embedding / residual,
        "attention_scale": attention,
        "logits_divisor": logits,
    }


FAMILY = Family("granite", ("granite",), ("granite",), from_hf, from_gguf, llama.wire)
