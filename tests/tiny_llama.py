"""A tiny random llama checkpoint without a tokenizer, for tests of what is around a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCAB = 97
CONTEXT = 128
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama checkpoint of CONFIG, as transformers writes them."""
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    kv = width // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    layers = range(CONFIG["num_hidden_layers"])
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (VOCAB, width), "lm_head.weight": (VOCAB, width)}
    return shapes | ends | {"model.norm.weight": (width,)}


def write_tiny(folder: Path, seed: int, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a model directory with random weights; `changes` go into config.json."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in tensor_shapes().items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def edit_tensors(folder: Path, add: dict[str, torch.Tensor] | None = None, remove: tuple[str, ...] = ()) -> None:
    """Change which tensors the checkpoint holds."""
    tensors = load_file(folder / "model.safetensors")
    for name in remove:
        del tensors[name]
    save_file(tensors | (add or {}), folder / "model.safetensors")
