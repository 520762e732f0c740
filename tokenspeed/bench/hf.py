"""Hugging Face transformers as a peer and an oracle: its model, filled with weights from our loader. Needs `.[dev]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tokenspeed.models.registry import Definition
from tokenspeed.weights.packed import Weight


def hf_model(
    config: Mapping[str, Any], definition: Definition, weights: Mapping[str, Weight], dtype: torch.dtype
) -> Any:
    """A transformers model of `config` (the contents of a config.json) with our weights, in `dtype`, in eval mode.

    Raises RuntimeError where names or shapes differ: every parameter must be given.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    settings = {key: value for key, value in config.items() if key != "model_type"}
    with no_init_weights():
        made = AutoConfig.for_model(config["model_type"], **settings)
        model = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="sdpa")
    missing, surplus = model.load_state_dict(hf_state(definition, weights, dtype), strict=False)
    absent = [name for name in missing if not (definition.config.tied and name == "lm_head.weight")]
    if absent or surplus:
        raise RuntimeError(f"transformers' model differs: missing {absent}, surplus {surplus}")
    model.tie_weights()
    return model.eval()


def hf_state(definition: Definition, weights: Mapping[str, Weight], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors under Hugging Face names: the loader's transforms undone, stacked weights taken apart."""
    state = {}
    for name, weight in weights.items():
        spec = definition.weights.specs[name]
        values = weight.unpacked(torch.float32 if spec.kind == "vector" else dtype)
        for source, rows in zip(spec.hf, values.split([source.rows for source in spec.hf]), strict=True):
            state[source.name] = (rows - 1 if source.transform == "add_one" else rows).to(dtype)
    return state
