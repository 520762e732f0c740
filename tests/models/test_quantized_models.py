"""`--quantization` end to end: log-probabilities those of transformers on the quantised values, and bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.parity_cases import MOE_FAMILY_CASES, ROUTING_MARGIN
from tests.parity_tools import CASES, TURNED, Tiny, oracle_logits, random_prompt, routing_margin
from tests.quantization.blocks_data import oracle as dequantized
from tests.seeds import SEED
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.quantization.groups import MODES
from tokenspeed.quantization.mxfp4 import quantize_mxfp4
from tokenspeed.quantization.pack import pack
from tokenspeed.runner.ref_backend import RefBackend
from tokenspeed.sol.floor import stored_bytes
from tokenspeed.sol.plan_table import plan_table
from tokenspeed.sol.report import step_report

BOUNDS = {"ref": 1e-4, "cpu": 2e-3}
"""Of |dlogprob| of the 20 best: ref computes in float32; the walk's activations keep 16 bits per block of 32."""


def quantized_oracle(made: Tiny, mode: str) -> PreTrainedModel:
    """The transformers model with every matrix as the engine should hold it."""
    model = copy.deepcopy(made.oracle)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.dim() > 1 and not name.endswith(("bias", "mlp.gate.weight", "mlp.router.weight")):
                fmt = "Q8_0" if "embed" in name or "lm_head" in name else MODES[mode]
                rows = values.transpose(1, 2) if values.dim() == 3 and made.case.model_type in TURNED else values
                flat = rows.reshape(-1, rows.shape[-1])
                rows.copy_(torch.from_numpy(dequantized(pack(flat, fmt).numpy(), fmt)).view(rows.shape))
    return model


def load(path: Path, backend: str, mode: str, **settings: Any) -> LLM:
    dtype = "float32" if backend == "ref" else "bfloat16"
    llm = LLM(str(path), dtype=dtype, kv_cache_dtype="float32", quantization=mode, **settings)
    assert llm.core.backend.name == backend
    return llm


@pytest.mark.parametrize("backend", BOUNDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name, fmt",
    [
        ("llama", "BF16"),
        ("llama", "gguf-F16"),
        ("gemma3", "F32"),
        ("qwen2", "gguf-F16"),
        ("glm4", "BF16"),
        ("mixtral", "BF16"),
        ("gpt_oss", "BF16"),
    ],
)
def test_logprobs_of_the_quantised_values(tiny, name: str, fmt: str, mode: str, backend: str) -> None:
    made = tiny(name, fmt)
    llm = load(made.path, backend, mode)
    prompt = random_prompt(40, made.case.seed if name in MOE_FAMILY_CASES else SEED)
    quantized = quantized_oracle(made, mode)
    assert routing_margin(quantized, prompt) > ROUTING_MARGIN, "choose another seed"
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20)
    (output,) = llm.generate(prompt_token_ids=prompt, sampling_params=params, use_tqdm=False)
    expected = oracle_logits(quantized, prompt).log_softmax(-1)
    plain = oracle_logits(made.oracle, prompt).log_softmax(-1)
    assert output.prompt_logprobs is not None
    errors, moved = [], []
    for row, entries in enumerate(output.prompt_logprobs[1:]):
        assert entries is not None
        errors += [abs(entry.logprob - float(expected[row, token])) for token, entry in entries.items()]
        moved += [abs(entry.logprob - float(plain[row, token])) for token, entry in entries.items()]
    assert len(errors) >= 39 * 20
    assert max(errors) < BOUNDS[backend]
    assert max(moved) > 10 * BOUNDS["ref"], "quantising should show"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, fmt", [("llama", "BF16"), ("gemma3", "F32"), ("llama", None)])
def test_bytes_are_what_the_floors_count(tiny, tmp_path: Path, name: str, fmt: str | None, mode: str) -> None:
    """fmt None: random weights of the config alone."""
    path = tiny(name, fmt or "BF16").path
    if fmt is None:
        (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
        path = tmp_path
    llm = load(path, "cpu", mode, load_format="auto" if fmt else "dummy")
    model = llm.core.model
    checkpoint = llm.core.files.checkpoint
    stored = stored_bytes(model.definition.weights, checkpoint, mode)
    assert model.file_bytes == llm.core.backend.weight_bytes
    matrices = {name for name, weight in model.packed.items() if weight.spec.kind != "vector"}
    assert {name: stored[name] for name in matrices} == {name: model.file_bytes[name] for name in matrices}
    shape = model.packed["layers.0.down"].shape
    assert model.file_bytes["layers.0.down"] == shape[0] * shape[1] // 32 * {"int8": 34, "int4": 20}[mode]
    assert all(segment.data.device.type == "meta" for weight in model.packed.values() for segment in weight.segments)
    report, table = (made(str(path), "H200", 1, 100, mode, "int8") for made in (step_report, plan_table))
    assert report.total.cost.bytes == pytest.approx(table.total.cost.bytes)
    head = CASES[name].settings["head_dim"]
    layers, kv_heads = CASES[name].settings["num_hidden_layers"], CASES[name].settings["num_key_value_heads"]
    if name == "llama":  # no windows
        assert report.total.cost.kv_bytes == pytest.approx(layers * 101 * 2 * kv_heads * (head + 2))


def test_quantised_files_are_refused_by_name(tiny) -> None:
    made = tiny("llama", "gguf-Q4_0")
    for refuse in (
        lambda: LLM(str(made.path), quantization="int4"),
        lambda: step_report(str(made.path), "H200", 1, 8, "int4"),
    ):
        with pytest.raises(ConfigError, match=r"--quantization int4: weight embed is quantised already \(Q4_0\)"):
            refuse()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mxfp4_on_the_cpu_is_the_reference(tiny, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    """Projections have the values of the format; embedding, head and vectors stay."""
    path = tiny("llama", "BF16").path
    plain, packed = (LLM(str(path), dtype=dtype, quantization=mode).core.backend for mode in (None, "mxfp4"))
    assert isinstance(packed, RefBackend)
    if dtype == "bfloat16":
        assert packed.fallback_ops == ["--quantization mxfp4"]
        assert "no fast kernel for: --quantization mxfp4" in caplog.text
    original = LLM(str(path), dtype="float32").core.backend
    assert isinstance(original, RefBackend)
    assert plain is not packed
    for name, values in packed.weights.items():
        wanted = original.weights[name]
        if wanted.dim() > 1 and "layers" in name:
            wanted = quantize_mxfp4(wanted).dequantized(torch.float32)
        assert (values == wanted.to(values.dtype)).all(), name


def test_prefix_keys_tell_quantised_models_apart(tiny) -> None:
    path = tiny("llama", "BF16").path
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"quantization": "mxfp4"},
        {"kv_cache_dtype": "int8"},
        {"kv_cache_dtype": "fp8"},
    )
    assert len({LLM(str(path), **settings).core.cache._root for settings in changes}) == len(changes)


def test_prefix_keys_tell_the_two_rotations_of_longrope_apart(tiny) -> None:
    path = tiny("phi3-long", "BF16").path
    assert len({LLM(str(path), max_model_len=length).core.cache._root for length in (16, 17, None)}) == 2
