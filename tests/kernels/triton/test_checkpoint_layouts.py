"""Quantised checkpoints by the GPU's backend: which weights stay narrow, that they keep the file's values, and answers
of the real kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.triton.gpu_fakes import FakeLink
from tests.kernels.triton.test_invariant_engine import register_here
from tests.parity_tools import CASES, load, oracle_logits, random_prompt
from tests.quantized_files import METHODS, Quantized, make_mxfp4, make_quantized
from tests.seeds import SEED
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts
from tokenspeed.quantization.narrow import NarrowWeight
from tokenspeed.runner import build
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.executor import GpuExecutor
from tokenspeed.runner.gpu.link import TritonSteps

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 32}
EQUAL = WIDE | {"num_attention_heads": 4, "num_key_value_heads": 4}
FEW_KEYS = WIDE | {"num_attention_heads": 4, "num_key_value_heads": 2}
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 80, "kv_cache_memory_bytes": 4 << 20}
UNPACKED = ("ct-int8-zeros", "ct-int8-groups", "ct-int8-packed-zeros", "ct-nvfp4", "gptq-8", "modelopt-nvfp4")
Maker = Callable[..., Quantized]


@pytest.fixture
def made(tmp_path: Path) -> Maker:
    def make(name: str, settings: dict[str, Any] = EQUAL, family: str = "qwen3-tied") -> Quantized:
        case = CASES[family]
        return make_quantized(replace(case, settings=case.settings | settings), METHODS[name], tmp_path, SEED)

    return make


def backend_of(path: Path, dtype: str = "float32") -> GpuBackend:
    return GpuBackend(load(path, dtype), register=register_here)


def joined(quantized: Quantized, *parts: str) -> torch.Tensor:
    """Values of a joined weight of the first layer, float64."""
    names = [name for part in parts for name in quantized.values if name.endswith(f"layers.0.{part}_proj.weight")]
    return torch.cat([torch.from_numpy(quantized.values[name]) for name in names])


PARTS = {
    "qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "o": ("self_attn.o",),
    "gate_up": ("mlp.gate", "mlp.up"),
    "down": ("mlp.down",),
}


FIRST = ("fp8-block", "fp8-tensor", "ct-int8-packed", "ct-nvfp4", "gptq-zeros", "awq-64")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in METHODS]
)
def test_weights_have_the_values_of_the_file(made: Maker, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """As they are in narrow types, else in the compute dtype; parts have other scales than their neighbours."""
    quantized = made(name)
    backend = backend_of(quantized.path)
    for weight, parts in PARTS.items():
        held, wanted = backend.weights[f"layers.0.{weight}"], joined(quantized, *parts)
        assert isinstance(held, NarrowWeight) == (name not in UNPACKED)
        found = held.dequantized(torch.float32) if isinstance(held, NarrowWeight) else held
        assert isinstance(found, torch.Tensor)
        assert (found.double() - wanted).abs().max() <= wanted.abs().max() * 2**-23
    said = f"4 quantised matrices are unpacked to float32, {4 * 163840 / 1e9:.2f} GB" in caplog.text
    assert said == (name in UNPACKED)
    if name not in UNPACKED:
        narrow = {key: size for key, size in backend.weight_bytes.items() if "norm" not in key and "embed" not in key}
        assert sum(narrow.values()) < 1.2 * sum(backend.model.file_bytes[key] for key in narrow)


def test_blocks_that_parts_cut_are_unpacked(made: Maker) -> None:
    """Keys have 64 rows, so blocks of the values' rows would begin in the middle of one."""
    backend = backend_of(made("fp8-block", FEW_KEYS).path)
    narrow = {name for name, weight in backend.weights.items() if isinstance(weight, NarrowWeight)}
    assert narrow == {f"layers.0.{name}" for name in ("o", "gate_up", "down")}
    assert backend.formats["layers.0.qkv"] == ("BF16",)


MOE = FEW_KEYS | {"num_local_experts": 3}


@pytest.mark.parametrize(
    "name, ff, held",
    [
        ("fp8-block", 128, True),
        ("fp8-block", 192, False),
        ("ct-fp8-channel", 192, True),
        ("gptq", 128, False),
        ("gptq-zeros", 192, False),
    ],
)
def test_experts(made: Maker, name: str, ff: int, held: bool) -> None:
    """In fp8 as they are, by block only where the blocks of gate rows end with them; else both unpacked."""
    quantized = made(name, MOE | {"moe_intermediate_size": ff}, "qwen3_moe")
    backend = backend_of(quantized.path)
    for part, parts in (("gate_up", ("gate", "up")), ("down", ("down",))):
        weight = backend.weights[f"layers.0.experts_{part}"]
        assert isinstance(weight, Fp8Weight) == held
        found = weight.dequantized(torch.float32) if isinstance(weight, Fp8Weight) else weight
        assert isinstance(found, torch.Tensor)
        for number, matrix in enumerate(found.double().numpy()):
            base = f"model.layers.0.mlp.experts.{number}."
            wanted = np.concatenate([quantized.values[f"{base}{each}_proj.weight"] for each in parts])
            assert np.abs(matrix - wanted).max() <= np.abs(wanted).max() * 2**-23


@pytest.mark.parametrize("parts", ["(gate|up)", "down"])
def test_experts_whose_parts_differ_are_unpacked(parts: str, tmp_path: Path) -> None:
    method = replace(METHODS["ct-fp8-channel"], modules=rf"model\.layers\.\d+\.mlp\..*{parts}_proj")
    case = replace(CASES["qwen3_moe"], settings=CASES["qwen3_moe"].settings | MOE)
    backend = backend_of(make_quantized(case, method, tmp_path, SEED).path)
    assert not any(isinstance(weight, NarrowWeight) for weight in backend.weights.values())


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    quantized = make_mxfp4(CASES["gpt_oss"], tmp_path, SEED)
    backend = backend_of(quantized.path, "bfloat16")
    for name, part in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
        values = torch.from_numpy(quantized.values[f"model.layers.1.mlp.experts.{part}"])
        if name == "gate_up":
            values = torch.cat((values[:, 0::2], values[:, 1::2]), dim=1)
        found = backend.weights[f"layers.1.experts_{name}"]
        assert isinstance(found, Mxfp4Experts)
        assert (found.dequantized(torch.float64) == values).all()


def opened(monkeypatch: pytest.MonkeyPatch, path: Path) -> LLM:
    def executor(backend: GpuBackend, arena: Any, max_num_seqs: int, max_len: int) -> GpuExecutor:
        kernels = TritonSteps(backend.num_heads, 4)
        return GpuExecutor(backend, arena, kernels, FakeLink(), max_num_seqs=max_num_seqs, max_len=max_len)

    with monkeypatch.context() as patch:
        patch.setattr(build, "choose_backend", lambda loaded, *rest: GpuBackend(loaded, register=register_here))
        patch.setattr(build, "gpu_executor", executor)
        return LLM(str(path), max_num_seqs=2, **SETTINGS)


ANSWERS = ("gptq-zeros", "fp8-block", "ct-fp8-channel", "ct-int8-channel", "ct-int4-zeros", "awq", "ct-nvfp4")


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_those_of_transformers(made: Maker, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of fp8 with activations in e4m3, so only nearly."""
    quantized = made(name, FEW_KEYS)
    llm, prompt = opened(monkeypatch, quantized.path), random_prompt(9, SEED)
    asked = SamplingParams(temperature=0, max_tokens=2, logprobs=5, ignore_eos=True)
    (output,) = llm.generate(prompt_token_ids=prompt, sampling_params=asked, use_tqdm=False)
    found = output.outputs[0]
    expected = oracle_logits(quantized.oracle, [*prompt, found.token_ids[0]]).log_softmax(-1)[-2:]
    assert found.logprobs is not None
    for row, entries in zip(expected, found.logprobs, strict=True):
        for token, entry in entries.items():
            assert abs(entry.logprob - float(row[token])) < (0.5 if "fp8" in name else 1e-3)
