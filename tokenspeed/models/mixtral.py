"""Mixtral: Llama's wiring with experts in every layer.

Its GGUF files are of the architecture llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.layers.moe import Moe
from tokenspeed.models import llama
from tokenspeed.models.dense import MIXTRAL_EXPERTS, DenseConfig, Family, hf_config, size


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json."""
    config = {"rms_norm_eps": 1e-5, **config}
    layers = size(config, "num_hidden_layers")
    window = size(config, "sliding_window") if config.get("sliding_window") is not None else 0
    experts = size(config, "num_local_experts", 8), size(config, "num_experts_per_tok", 2)
    return hf_config(
        config,
        1e6,
        windows=(window,) * layers,
        moe=Moe(*experts, size(config, "intermediate_size")),
        sparse=(True,) * layers,
        expert_names=MIXTRAL_EXPERTS,
    )


FAMILY = Family("mixtral", ("mixtral",), (), from_hf, llama.from_gguf, llama.wire)
