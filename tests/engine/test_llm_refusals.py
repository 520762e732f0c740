"""What `LLM` refuses: one clear error that names the thing, before anything runs, and the next call works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_llm import GREEDY, random_ids, run
from tests.engine.test_llm_sampling import write_gguf
from tests.tiny_llama import CONFIG, CONTEXT, VOCAB, edit_tensors
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import (
    ConfigError,
    FormatError,
    MemoryLimitError,
    ModelNotFoundError,
    ParameterError,
    PromptError,
    TokenSpeedError,
    UnsupportedError,
    WeightError,
)
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.runner.build import kv_cache_dtype

GOOD = [1, 2, 3]


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ([], PromptError, "empty"),
        ("", PromptError, "empty"),
        ({"prompt": ""}, PromptError, "empty"),
        ({"prompt": None}, PromptError, "a prompt is text"),
        ({}, ParameterError, "prompt_token_ids"),
        ({"prompt": "x", "image": 1}, ParameterError, "image"),
        ([0] * CONTEXT, PromptError, rf"{CONTEXT} tokens.*max_model_len {CONTEXT}"),
        ([1, VOCAB], PromptError, rf"{VOCAB} is not in the vocabulary \(0 to {VOCAB - 1}\)"),
        ([1, -1], PromptError, "-1 is not in the vocabulary"),
        ([1, 2.5], PromptError, "a prompt is text"),
        ([1, None], PromptError, "a prompt is text"),
        (None, PromptError, "got None"),
        (5, PromptError, "got 5"),
        ("text", PromptError, "no tokenizer"),
    ],
)
def test_a_bad_prompt_stops_its_whole_batch_and_nothing_else(
    llm: LLM, bad: Any, error: type[TokenSpeedError], message: str
) -> None:
    before = run(llm, [GOOD], GREEDY)
    llm.core.cache.reset()
    with pytest.raises(error, match=message):
        llm.generate([{"prompt_token_ids": GOOD}, bad, {"prompt_token_ids": GOOD}], GREEDY, use_tqdm=False)
    assert not llm.core.has_work
    assert llm.core.cache.num_cached_pages == 0
    assert run(llm, [GOOD], GREEDY) == before


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ParameterError, "either prompts or prompt_token_ids"),
        ({"prompts": "a", "prompt_token_ids": [1]}, ParameterError, "either prompts or prompt_token_ids"),
        ({"prompt_token_ids": "abc"}, PromptError, "'abc'"),
        ({"prompts": 7}, PromptError, "got 7"),
        ({"prompts": GOOD, "sampling_params": [GREEDY, GREEDY]}, ParameterError, "2 sampling_params for 1 prompts"),
        ({"prompts": GOOD, "sampling_params": {"temperature": 0}}, ParameterError, "sampling_params must be"),
        ({"prompts": GOOD, "sampling_params": [None]}, ParameterError, "sampling_params must be"),
        ({"prompts": GOOD, "sampling_params": SamplingParams(stop_token_ids=[VOCAB])}, ParameterError, str(VOCAB)),
        ({"prompts": GOOD, "sampling_params": SamplingParams(stop="x")}, ParameterError, "stop needs a tokenizer"),
    ],
)
def test_bad_arguments(llm: LLM, arguments: dict[str, Any], error: type[TokenSpeedError], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.generate(**arguments, use_tqdm=False)
    assert not llm.core.has_work


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n": 0}, "n must be"),
        ({"stop": ["x"], "best_of": 2}, "best_of"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 65}, "logprobs must be an integer from 0 to 64, got 65"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"seed": "1"}, "seed"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
)
def test_bad_sampling_parameters(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        SamplingParams.from_dict(fields)


def test_the_constructor_names_an_unknown_parameter() -> None:
    with pytest.raises(TypeError, match="'best_of'"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"tensor_parallel": 2}, ConfigError, r"unknown engine setting: tensor_parallel \(known: model, "),
        ({"dtype": "int8"}, ConfigError, "--dtype must be one of auto, bfloat16"),
        ({"dtype": "float16"}, ConfigError, "--dtype float16"),
        ({"kv_cache_dtype": "float16"}, ConfigError, "--kv-cache-dtype float16"),
        ({"kv_cache_dtype": "int4"}, ConfigError, "--kv-cache-dtype must be one of auto, .* int8, fp8, fp8_e4m3"),
        ({"quantization": "int3"}, ConfigError, "--quantization must be one of int8, int4, fp8, mxfp4, got 'int3'"),
        ({"quantization": 8}, ConfigError, "--quantization must be str or none, got 8"),
        ({"device": "tpu"}, ConfigError, "--device must be one of"),
        ({"max_model_len": 1}, ConfigError, "--max-model-len must be at least 2"),
        ({"max_model_len": CONTEXT + 1}, ConfigError, f"--max-model-len {CONTEXT + 1} is more than .* {CONTEXT}"),
        ({"max_num_seqs": 0}, ConfigError, "--max-num-seqs must be at least 1"),
        ({"max_num_batched_tokens": True}, ConfigError, "--max-num-batched-tokens must be int"),
        ({"block_size": "16"}, ConfigError, "--block-size must be int, got '16'"),
        ({"enable_prefix_caching": 1}, ConfigError, "--enable-prefix-caching must be bool"),
        ({"kv_cache_memory_bytes": 1000}, MemoryLimitError, r"needs .* MiB free: raise --kv-cache-memory-bytes"),
        ({"kv_cache_memory_bytes": 2**60}, MemoryLimitError, "--kv-cache-memory-bytes .* free"),
    ],
)
def test_bad_settings(tiny_path: Path, settings: dict[str, Any], error: type[TokenSpeedError], message: str) -> None:
    with pytest.raises(error, match=message):
        LLM(str(tiny_path), **({"dtype": "float32"} | settings))


def test_int8_pages_are_for_the_cpu() -> None:
    config = EngineConfig(kv_cache_dtype="int8")
    assert kv_cache_dtype(config, torch.bfloat16, torch.device("cpu")).itemsize == 1
    with pytest.raises(ConfigError, match="--kv-cache-dtype int8 is not supported on cuda"):
        kv_cache_dtype(config, torch.bfloat16, torch.device("cuda"))


def test_a_cache_too_small_for_one_request(tiny_path: Path) -> None:
    page = 2 * 2 * 16 * 2 * 8 * 4
    with pytest.raises(MemoryLimitError, match="one sequence of 100 tokens"):
        LLM(str(tiny_path), dtype="float32", max_model_len=100, kv_cache_memory_bytes=6 * page)
    llm = LLM(str(tiny_path), dtype="float32", kv_cache_memory_bytes=6 * page + 1)
    assert (llm.core.capacity.num_pages, llm.core.capacity.max_model_len) == (6, 97)
    with pytest.raises(PromptError, match="97 tokens, max_model_len 97"):
        llm.generate([0] * 97, use_tqdm=False)
    assert len(run(llm, random_ids(50, 96), GREEDY)[0]) == 1


@pytest.fixture
def broken(tmp_path: Path, tiny_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_path, tmp_path / "model"))


def test_missing_and_surplus_tensors(broken: Path) -> None:
    edit_tensors(broken, {"model.extra": torch.zeros(2)}, ("model.layers.1.mlp.up_proj.weight",))
    with pytest.raises(WeightError, match=r"lacks 1 tensor: 'model.layers.1.mlp.up_proj.weight'.*'model.extra'"):
        LLM(str(broken))


def test_a_tensor_of_the_wrong_shape(broken: Path) -> None:
    edit_tensors(broken, {"model.norm.weight": torch.zeros(31)})
    with pytest.raises(WeightError, match=r"model.norm.weight' \[31\] instead of \[32\]"):
        LLM(str(broken))


def test_a_tensor_of_an_unsupported_type(broken: Path) -> None:
    edit_tensors(broken, {"model.norm.weight": torch.zeros(32, dtype=torch.int64)})
    with pytest.raises(UnsupportedError, match=r"model.norm.weight' of type I64 \(supported types: .*BF16"):
        LLM(str(broken))


@pytest.mark.parametrize("cut", [1, 5000])
def test_truncated_safetensors(broken: Path, cut: int) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        LLM(str(broken))


def test_a_corrupt_safetensors_header(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"!" + file.read_bytes()[9:])
    with pytest.raises(FormatError, match=r"model\.safetensors: the header is not JSON"):
        LLM(str(broken))


@pytest.mark.parametrize("keep", [3, 100, 2000, -1])
def test_truncated_gguf(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, 0)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"tiny\.gguf"):
        LLM(str(file))


def test_a_gguf_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(FormatError, match="not a GGUF file"):
        LLM(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba9"}, "model_type 'mamba9' is not supported .*gemma3_text.*llama.*qwen3"),
        ({"quantization_config": {"quant_method": "quip"}}, "quip"),
    ],
)
def test_unsupported_configs(broken: Path, change: dict[str, Any], message: str) -> None:
    (broken / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(UnsupportedError, match=message):
        LLM(str(broken))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
def test_config_json_that_is_no_object(broken: Path, content: bytes) -> None:
    (broken / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"config\.json"):
        LLM(str(broken))


@pytest.mark.parametrize("lost", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"])
def test_config_json_without_a_needed_field(broken: Path, lost: str) -> None:
    (broken / "config.json").write_text(json.dumps({key: CONFIG[key] for key in CONFIG if key != lost}))
    with pytest.raises(FormatError, match=lost):
        LLM(str(broken))


@pytest.mark.parametrize(
    "field, value", [("eos_token_id", "x"), ("eos_token_id", [1, None]), ("temperature", "hot"), ("top_p", 3)]
)
def test_generation_config_with_a_wrong_field(broken: Path, field: str, value: Any) -> None:
    (broken / "generation_config.json").write_text(json.dumps({field: value}))
    with pytest.raises(TokenSpeedError, match=field):
        LLM(str(broken))


def test_models_that_are_not_there(broken: Path, tmp_path: Path) -> None:
    (broken / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        LLM(str(broken))
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(ModelNotFoundError, match=r"qwen3-8b is a shipped config.*--load-format dummy"):
        LLM("qwen3-8b")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="pickle"):
        LLM(str(tmp_path / "model.bin"))
