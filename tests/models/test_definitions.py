"""What configs mean: shipped ones, old and new spellings, random weights, and what is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from math import prod
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.parity_cases import GGUF_CASES
from tests.parity_tools import CASES, CONTEXT, INTERLEAVED, VOCAB, Walker, load, oracle_logits, random_prompt
from tokenspeed import LLM, SamplingParams
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import FormatError, UnsupportedError, WeightError
from tokenspeed.formats.gguf import open_gguf
from tokenspeed.models.registry import define, define_from_hf, shipped_configs
from tokenspeed.runner.build import open_model

SHIPPED = ("gemma-3-270m", "gpt-oss-20b", "llama-3.1-8b", "llama-3.2-1b", "qwen3-30b-a3b", "qwen3-8b")
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
}
SMALL_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 3}
OLD_SPELLINGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e4},
    "llama-llama3": {
        "rope_theta": 5e4,
        "rope_scaling": {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2": {"rope_theta": 1e5},
    "qwen3": {"rope_theta": 1e6, "rope_scaling": None},
    "gemma3": {"rope_theta": 2e5, "rope_local_base_freq": 500.0, "sliding_window_pattern": 3},
    "gemma3-linear": {
        "rope_theta": 2e5,
        "rope_local_base_freq": 500.0,
        "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3-implied": {},
    "llama-yarn": {
        "rope_theta": 1e4,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "glm4": {"rope_theta": 1e4},
    "phi3-long": {
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "yarn",
            "short_factor": [1.0 + 0.1 * i for i in range(12)],
            "long_factor": [1.0 + i * i for i in range(12)],
        },
    },
    "gemma2": {"rope_theta": 1e4},
    "smollm3": {"rope_theta": 5e4},
    "mixtral": {"rope_theta": 1e4},
    "qwen3_moe": {"rope_theta": 1e4, "num_experts": 7},
    "glm4_moe": {"rope_theta": 1e4},
    "gpt_oss": {
        "rope_theta": 1e4,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "truncate": False,
        },
    },
    "minimax_m2": {"rope_theta": 1e4, "rotary_dim": 8},
}
"""What config.json held before transformers 5, in place of those that it has now."""
LATE_KEYS = ("rope_parameters", "layer_types", "no_rope_layers")


def in_transformers(config):
    """The same config.json as transformers reads and rewrites it."""
    kind = config["model_type"]
    return AutoConfig.for_model(kind, **{key: value for key, value in config.items() if key != "model_type"})


def test_the_shipped_configs_are_those_tested_here():
    assert tuple(shipped_configs()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_means_what_transformers_takes_it_for(name):
    shipped = shipped_configs()[name]
    config = in_transformers(shipped)
    definition = define_from_hf(shipped)
    assert define_from_hf(config.to_dict()).config == definition.config
    with torch.device("meta"):
        oracle = AutoModelForCausalLM.from_config(config)
    assert sum(prod(spec.shape) for spec in definition.weights.specs.values()) == oracle.num_parameters()


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_old_spelling_of_a_config(tiny, name):
    checkpoint = tiny(name, "F32")
    config = json.loads((checkpoint.path / "config.json").read_text())
    old = {key: value for key, value in config.items() if key not in LATE_KEYS}
    assert old != config
    assert define_from_hf(old | OLD_SPELLINGS[name]).config == define_from_hf(config).config


@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf_metadata_means_what_config_json_does(tiny, name):
    """Only the flag for permuted rows and the rounding of numbers may differ."""
    ours = define(open_gguf(tiny(name, "gguf-F32").path)).config
    theirs = load(tiny(name, "F32").path).definition.config
    assert ours.gguf_permuted == (CASES[name].model_type in INTERLEAVED)
    for key in ("ropes", "long_ropes"):
        for rope, other in zip(getattr(ours, key), getattr(theirs, key), strict=True):
            assert rope.dim == other.dim
            assert (rope.theta, rope.scale) == pytest.approx((other.theta, other.scale))
            assert rope.divisors == pytest.approx(other.divisors, rel=1e-5)
    floats = [field.name for field in fields(ours) if field.type == "float"]
    rounded = {key: getattr(theirs, key) for key in ("ropes", "long_ropes", *floats)}
    for key in floats:
        assert getattr(ours, key) == pytest.approx(getattr(theirs, key)), key
    assert replace(ours, gguf_permuted=False, **rounded) == theirs


@pytest.mark.parametrize("name", SHIPPED)
def test_dummy_weights_of_a_small_variant(tmp_path, name):
    """Random weights run, are the same for the same seed, and compute what transformers does with them."""
    shipped = shipped_configs()[name] | SMALL
    shipped |= {key: value for key, value in SMALL_EXPERTS.items() if key in shipped}
    (tmp_path / "config.json").write_text(json.dumps(shipped))
    settings = {"device": "cpu", "load_format": "dummy", "dtype": "float32"}
    prompts = [random_prompt(length, length) for length in (1, 21)]
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    tokens = []
    for seed in (1, 1, 2):
        llm = LLM(str(tmp_path), **settings, seed=seed)
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
        tokens.append([output.outputs[0].token_ids for output in outputs])
    assert all(len(new) == 5 and all(0 <= token < VOCAB for token in new) for new in tokens[0])
    assert tokens[0] == tokens[1] != tokens[2]
    oracle = AutoModelForCausalLM.from_config(
        in_transformers(shipped), dtype=torch.float32, attn_implementation="eager"
    )
    copy_weights(llm.core.model, oracle)
    expected = oracle_logits(oracle.eval(), prompts[1])
    torch.testing.assert_close(Walker(llm.core.model).logits(prompts[1]), expected, atol=1e-4, rtol=0)


def copy_weights(model, oracle):
    """Into the transformers model, by the names the weight table gives."""
    parameters = dict(oracle.named_parameters())
    with torch.no_grad():
        for name, spec in model.definition.weights.specs.items():
            sources = spec.hf_stacked or spec.hf
            rows = model.packed[name].unpacked(torch.float32).reshape(spec.rows, -1)
            for source, values in zip(sources, rows.split([source.rows for source in sources]), strict=True):
                copy_rows(values - float(source.transform == "add_one"), source, parameters.pop(source.name))
    assert not parameters


def copy_rows(values, source, parameter):
    """Into one tensor, as a checkpoint would have it."""
    if source.transform == "unpermute_rope":
        values = values.unflatten(0, (source.heads, 2, -1)).transpose(1, 2).reshape(values.shape)
    if source.transposed:
        values = values.unflatten(0, (source.shape[0], -1)).transpose(1, 2)
    parameter.copy_(values.reshape(parameter.shape))


@pytest.mark.parametrize("name", SHIPPED)
def test_dummy_of_a_shipped_name_opens_without_files(name):
    files = open_model(EngineConfig(model=name, load_format="dummy"))
    assert (files.source, files.checkpoint) == (None, None)
    assert files.definition.program().outputs.keys() == {"logits"}


FAMILY_NAMES = tuple(name for name in CASES if "-" not in name)
REFUSED: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 4.0}},
        {"quantization_config": {"quant_method": "quip"}},
        {"model_type": "mamba"},
    ],
    "qwen2": [{"use_sliding_window": True}],
    "qwen3": [{"attention_bias": True}, {"use_sliding_window": True}],
    "mistral": [{"layer_types": ["full_attention", "sliding_attention"]}],
    "smollm3": [{"use_sliding_window": True}],
    "qwen3_moe": [{"use_sliding_window": True}],
    "glm4_moe": [{"scoring_func": "softmax"}, {"topk_method": "greedy"}],
    "minimax_m2": [
        {"attention_bias": True},
        {"shared_intermediate_size": 64},
        {"sliding_window": 8},
        {"scoring_func": "softmax"},
        {"qk_norm_type": "per_head"},
        {"use_qk_norm": False},
        {"attn_type_list": [1, 0]},
    ],
    "gemma2": [{"use_bidirectional_attention": True}, {"attention_bias": True}],
    "gemma3": [
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"use_bidirectional_attention": True},
        {"attention_bias": True},
    ],
}


@pytest.mark.parametrize("name, change", [(name, change) for name, changes in REFUSED.items() for change in changes])
def test_a_variant_we_do_not_run_is_refused_by_name(tiny, name, change):
    config = json.loads((tiny(name, "F32").path / "config.json").read_text())
    define_from_hf(config)
    word = str(change.get("model_type") or next(iter(change))).removesuffix("_parameters")
    with pytest.raises(UnsupportedError, match=word):
        define_from_hf(config | change)


def test_layers_that_predict_further_tokens_are_left_unread(tiny, tmp_path):
    """glm4_moe's file may go on after its last layer, by as many as the config says."""
    checkpoint = tiny("glm4_moe", "F32")
    tensors = {name: torch.zeros(2) for name in ("model.layers.3.eh_proj.weight", "model.layers.3.mlp.gate.weight")}
    stored = load_file(checkpoint.path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint.path / "config.json").read_bytes())
    save_file(stored | tensors, tmp_path / "model.safetensors")
    prompt = random_prompt(9, 4)
    got = Walker(load(tmp_path)).logits(prompt)
    torch.testing.assert_close(got, oracle_logits(checkpoint.oracle, prompt), atol=1e-4, rtol=0)
    save_file(stored | tensors | {"model.layers.4.enorm.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"surplus 1 tensor: 'model.layers.4.enorm.weight'"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["qwen3_moe", "minimax_m2"])
def test_experts_of_transformers_own_layout(tiny, tmp_path, name):
    """A tensor for all experts, as transformers has them in memory; other names as on the hub."""
    checkpoint = tiny(name, "F32")
    stored = load_file(checkpoint.path / "model.safetensors")
    values = {key: value for key, value in stored.items() if ".experts." not in key}
    stacked = {key: value for key, value in checkpoint.oracle.state_dict().items() if ".experts." in key}
    (tmp_path / "config.json").write_bytes((checkpoint.path / "config.json").read_bytes())
    save_file(values | stacked, tmp_path / "model.safetensors")
    prompt = random_prompt(9, 5)
    assert len(values | stacked) < len(stored)
    got, expected = (Walker(load(path)).logits(prompt) for path in (tmp_path, checkpoint.path))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_config_without_a_size_is_refused_by_name(tiny, name, key):
    config = json.loads((tiny(name, "F32").path / "config.json").read_text())
    del config[key]
    with pytest.raises(FormatError, match=key):
        define_from_hf(config)
