"""Mistral and Ministral: Llama's wiring with a window, in every layer or in those that `layer_types` names.

Mistral's GGUF files are of the architecture llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.models import llama
from tokenspeed.models.dense import DenseConfig, Family, hf_config, hf_windows, refuse_set, size

WINDOW = 4096
"""Of a config.json that names none; one that says null has none."""


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json."""
    if config["model_type"] == "mistral":
        refuse_set(config, "layer_types")
    config = {"sliding_window": WINDOW, **config}
    kind = "full_attention" if config["sliding_window"] is None else "sliding_attention"
    windows = hf_windows(config, [kind] * size(config, "num_hidden_layers"))
    return hf_config(config, windows=windows)


FAMILY = Family("mistral", ("mistral", "ministral"), (), from_hf, llama.from_gguf, llama.wire)
