"""SmolLM3: Llama's wiring; some layers do not turn queries and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokenspeed.contracts.errors import FormatError
from tokenspeed.models import llama
from tokenspeed.models.dense import DenseConfig, Family, GGUFConfig, gguf_config, hf_biases, hf_config, refuse_set, size
from tokenspeed.ops.rope import no_rope

THETA = 2e6
INTERVAL = 4
"""Every fourth layer has no rotation; of a GGUF file always."""


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json; `no_rope_layers` has a 1 for each layer that turns."""
    refuse_set(config, "use_sliding_window")
    layers = size(config, "num_hidden_layers")
    turning = config.get("no_rope_layers") or _turning(layers, size(config, "no_rope_layer_interval", INTERVAL))
    if len(turning) < layers or not set(turning) <= {0, 1}:
        raise FormatError(f"no_rope_layers must be {layers} of 0 and 1, got {turning}")
    tied = config.get("tie_word_embeddings", True)
    return _still(hf_config(config, THETA, tied=tied, **hf_biases(config)), turning)


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata; its converter interleaves the rows of each Q and K head."""
    config = gguf_config(meta, gguf_permuted=True, **meta.biases())
    return _still(config, _turning(config.num_layers, INTERVAL))


def _turning(layers: int, interval: int) -> list[int]:
    return [int((i + 1) % interval != 0) for i in range(layers)]


def _still(config: DenseConfig, turning: Sequence[int]) -> DenseConfig:
    none = no_rope(config.head_dim)
    short, long = (
        tuple(rope if turns else none for rope, turns in zip(ropes, turning, strict=False))
        for ropes in (config.ropes, config.long_ropes)
    )
    return replace(config, ropes=short, long_ropes=long)


FAMILY = Family("smollm3", ("smollm3",), ("smollm3",), from_hf, from_gguf, llama.wire)
