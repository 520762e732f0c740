"""`--quantization` by the GPU's backend: its kernels in the interpreter, against the reference on the same values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.triton.gpu_fakes import FakeLink
from tests.kernels.triton.test_invariant_engine import register_here
from tests.parity_tools import CASES, make_gguf, make_safetensors, random_prompt
from tests.seeds import SEED
from tokenspeed.contracts.errors import ConfigError, UnsupportedError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.quantization.narrow import FORMATS, NarrowWeight
from tokenspeed.runner import build, model
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.executor import GpuExecutor
from tokenspeed.runner.gpu.link import TritonSteps
from tokenspeed.runner.ref_backend import RefBackend
from tokenspeed.sol.floor import stored_bytes

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 80,
    "kv_cache_memory_bytes": 4 << 20,
    "max_num_seqs": 2,
}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 32}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PACKED = ("int8", "int4", "mxfp4")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = CASES["qwen3-tied"]
    folder = tmp_path_factory.mktemp("wide")
    return make_safetensors(replace(case, settings=case.settings | WIDE), "BF16", folder).path


def opened(monkeypatch: pytest.MonkeyPatch, path: Path, kind: type, mode: str, **settings: Any) -> LLM:
    """An engine by the GPU's backend, or by the reference, with weights narrowed as on a GPU."""

    def executor(backend: GpuBackend, arena: Any, max_num_seqs: int, max_len: int) -> GpuExecutor:
        kernels = TritonSteps(backend.num_heads, 4)
        return GpuExecutor(backend, arena, kernels, FakeLink(), max_num_seqs=max_num_seqs, max_len=max_len)

    def choose(loaded: Any, *rest: Any) -> GpuBackend | RefBackend:
        if kind is RefBackend:
            return RefBackend(loaded, quantization=mode)
        return GpuBackend(loaded, register=register_here, quantization=mode)

    with monkeypatch.context() as patch:
        patch.setattr(build, "choose_backend", choose)
        patch.setattr(build, "gpu_executor", executor)
        patch.setattr(model, "MODES", ())  # as on a GPU: the backend narrows
        return LLM(str(path), quantization=mode, **(SETTINGS | settings))


@pytest.mark.slow
@pytest.mark.parametrize("mode", PACKED)
def test_tokens_and_logprobs_are_those_of_the_reference(path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """A prompt of more rows than the kernels take at once, then single rows."""
    asked = SamplingParams(temperature=0, max_tokens=3, logprobs=3, ignore_eos=True)
    prompts, answers = [random_prompt(66, SEED), random_prompt(5, SEED + 1)], []
    for kind in (GpuBackend, RefBackend):
        llm = opened(monkeypatch, path, kind, mode)
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=asked, use_tqdm=False)
        answers.append([output.outputs[0] for output in outputs])
        assert llm.core.backend.fallback_ops == []
    for found, wanted in zip(*answers, strict=True):
        assert found.token_ids == wanted.token_ids
        for ours, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
            expected = {token: entry.logprob for token, entry in theirs.items()}
            assert {token: entry.logprob for token, entry in ours.items()} == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("mode", PACKED)
def test_weights_are_narrow_and_counted(path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    llm = opened(monkeypatch, path, GpuBackend, mode, load_format="dummy", dtype="bfloat16")
    backend = llm.core.backend
    assert isinstance(backend, GpuBackend)
    narrowed = {name for name, weight in backend.weights.items() if isinstance(weight, NarrowWeight)}
    assert narrowed == {f"layers.0.{name}" for name in ("qkv", "o", "gate_up", "down")}
    assert all(backend.formats[name] == (FORMATS[mode],) for name in narrowed)
    stored = stored_bytes(llm.core.files.definition.weights, None, mode, gpu=True)
    assert backend.weight_bytes == stored
    embedding = backend.weights["embed"]
    assert isinstance(embedding, torch.Tensor)
    assert embedding.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [GpuBackend, RefBackend])
def test_what_cannot_be_narrowed_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    made = make_safetensors(CASES["llama"], "BF16", tmp_path / "plain")
    with pytest.raises(
        UnsupportedError, match=r"--quantization int4: weight layers\.0\.\w+: .* groups of 128, not \d+"
    ):
        opened(monkeypatch, made.path, kind, "int4")
    quantized = make_gguf(CASES["llama"], "Q4_0", tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match=r"--quantization int8: weight \S+ is quantised already \(Q4_0\)"):
        opened(monkeypatch, quantized.path, kind, "int8")
