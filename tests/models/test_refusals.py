"""Settings that change what a model computes, or that no model has, are refused by name and never ignored."""

from __future__ import annotations

import json
from typing import Any

import gguf
import numpy as np
import pytest

from tests.parity_tools import CASES
from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.formats.gguf import open_gguf
from tokenspeed.layers.moe import Moe
from tokenspeed.models import gemma3
from tokenspeed.models.dense import GATING, GGUFConfig
from tokenspeed.models.registry import define, define_from_hf

FAMILY_NAMES = tuple(name for name in CASES if "-" not in name)
GEMMAS = ("gemma2", "gemma3")


def config_of(tiny, name: str) -> dict[str, Any]:
    return json.loads((tiny(name, "F32").path / "config.json").read_text())


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_another_activation(tiny, name):
    config = config_of(tiny, name)
    key = "hidden_activation" if name in GEMMAS else "hidden_act"
    assert config[key] == ("gelu_pytorch_tanh" if name in GEMMAS else "silu")
    with pytest.raises(UnsupportedError, match="relu2"):
        define_from_hf(config | {key: "relu2"})


@pytest.mark.parametrize(
    "rope, word",
    [
        ({"rope_type": "proportional", "factor": 2.0}, "proportional"),
        ({"rope_type": "dynamic"}, "factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8}, "long_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}, "7 factors for 8"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1}, "original_max"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "original_max"),
    ],
)
def test_a_rope_that_is_unknown_or_lacks_a_value(tiny, rope, word):
    with pytest.raises((FormatError, UnsupportedError), match=word):
        define_from_hf(config_of(tiny, "llama") | {"rope_parameters": {"rope_theta": 1e4} | rope})


@pytest.mark.parametrize("kinds", [["full_attention"] * 3, ["full_attention"] * 3 + ["chunked_attention"]])
def test_layer_types_that_do_not_fit(tiny, kinds):
    with pytest.raises((FormatError, UnsupportedError), match=r"layer_types|chunked_attention"):
        define_from_hf(config_of(tiny, "gemma3") | {"layer_types": kinds})


@pytest.mark.parametrize("key", ["attention.sliding_window_pattern", "attention.head_count_kv"])
def test_gguf_values_per_layer(key):
    """GGUF allows an array here; one number for all layers is what these families read."""
    metadata = {
        "general.architecture": "gemma3",
        "gemma3.embedding_length": 64,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 2,
        "gemma3.attention.key_length": 16,
        "gemma3.attention.sliding_window": 8,
        "gemma3.block_count": 3,
        "gemma3.feed_forward_length": 64,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.context_length": 128,
    }
    gemma3.from_gguf(GGUFConfig(metadata, 199, tied=True))
    with pytest.raises((FormatError, UnsupportedError), match=key):
        gemma3.from_gguf(GGUFConfig(metadata | {f"gemma3.{key}": [2, 2, 2]}, 199, tied=True))


@pytest.mark.parametrize(
    "name, change, word",
    [
        ("smollm3", {"no_rope_layers": [1, 0, 1, 2, 1]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier"),
        ("granite", {"logits_scaling": "2"}, "logits_scaling"),
        ("glm4", {"rope_parameters": None, "partial_rotary_factor": 0.3, "head_dim": 10}, "3 columns"),
        ("ministral", {"layer_types": ["full_attention"]}, "layer_types"),
        ("mixtral", {"num_experts_per_tok": 6}, "6 of 5 experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("glm4_moe", {"n_group": 4}, "groups of 6 experts"),
        ("glm4_moe", {"n_group": 3, "topk_group": 4}, "4 of 3 groups"),
        ("glm4_moe", {"n_shared_experts": -1}, "n_shared_experts"),
        ("glm4_moe", {"first_k_dense_replace": None}, "first_k_dense_replace"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types"),
        ("minimax_m2", {"rotary_dim": 7, "rope_parameters": None, "rope_scaling": None}, "7 columns"),
    ],
)
def test_values_that_make_no_sense(tiny, name, change, word):
    with pytest.raises((FormatError, UnsupportedError), match=word):
        define_from_hf(config_of(tiny, name) | change)


@pytest.mark.parametrize("architecture, wanted", [("llama", 1), ("glm4moe", 2), ("minimax-m2", 2), ("gpt-oss", 3)])
def test_gguf_routers_of_another_kind(architecture, wanted):
    keys = {"feed_forward_length": 64, "expert_count": 4, "expert_used_count": 2}
    score = next(name for name, number in GATING.items() if number == wanted)
    for kind in (None, 1, 2, 3):
        extra = {} if kind is None else {"expert_gating_func": kind}
        metadata = {f"{architecture}.{key}": value for key, value in (keys | extra).items()}
        view = GGUFConfig(metadata | {"general.architecture": architecture}, 199, tied=True)
        if kind in (None, wanted):
            assert view.experts(score) == Moe(4, 2, 64, score=score)
            continue
        with pytest.raises(UnsupportedError, match=f"expert_gating_func {kind}"):
            view.experts(score)


@pytest.mark.parametrize(
    "scaling, word",
    [
        ({"type": "longrope"}, "longrope"),
        ({"type": "yarn"}, "rope.scaling.factor"),
        ({"type": "yarn", "factor": 4.0}, "original_context_length"),
        ({"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
    ],
)
def test_gguf_rope_scaling(tmp_path, scaling, word):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"embedding_length": 64, "attention.head_count": 4, "block_count": 1}.items():
        writer.add_uint32(f"llama.{key}", value)
    for key, value in scaling.items():
        add = writer.add_string if key == "type" else writer.add_float32
        add(f"llama.rope.scaling.{key}", value)
    writer.add_uint32("llama.feed_forward_length", 64)
    writer.add_uint32("llama.context_length", 64)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((CASES["llama"].settings["vocab_size"], 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises((FormatError, UnsupportedError), match=word):
        define(open_gguf(path))
