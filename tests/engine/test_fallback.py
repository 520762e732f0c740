"""What the C++ walk does not take runs all the same, says so once, and shows in the timings."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity_tools import CASES, make_gguf, random_prompt
from tests.seeds import SEED
from tests.tiny_llama import write_tiny
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.output import RequestOutput
from tokenspeed.engine.timings import run_timings
from tokenspeed.kernels import cpu
from tokenspeed.kernels.cpu import registration

PARAMS = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, logprobs=0)


def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenspeed.kernels.cpu._walk", None)
    monkeypatch.delattr(cpu, "_walk", raising=False)


def no_q5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "FORMATS", tuple(f for f in registration.FORMATS if f != "Q5_0"))


def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is missing."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_K, Q6_K, and Q5_0 in the down projections alone."""
    return make_gguf(CASES["gemma3"].with_k_widths(), "K", tmp_path_factory.mktemp("mixed") / "model.gguf").path


def generate(llm: LLM) -> RequestOutput:
    prompts = [random_prompt(21, SEED), random_prompt(5, SEED + 1)]
    first, second = llm.generate(prompt_token_ids=prompts, sampling_params=PARAMS, use_tqdm=False)
    assert all(len(each.outputs[0].token_ids) == 7 for each in (first, second))
    return first


def logprobs(output: RequestOutput) -> list[float]:
    found = output.outputs[0].logprobs
    assert found is not None
    return [each.logprob for entry in found for each in entry.values()]


@pytest.mark.parametrize(
    "lack, settings, backend, fallback",
    [
        (all_there, {}, "cpu", []),
        (no_q5, {}, "ref", ["linear"]),
        (no_extension, {}, "ref", ["all: the C++ extension is not built"]),
        (no_extension, {"precise": True}, "ref", ["all: the C++ extension is not built"]),
        (no_extension, {"dtype": "float32"}, "ref", []),
        (no_q5, {"dtype": "float32"}, "ref", []),
    ],
)
def test_a_kernel_that_is_missing(
    mixed: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lack: Callable[[pytest.MonkeyPatch], None],
    settings: dict[str, Any],
    backend: str,
    fallback: list[str],
) -> None:
    memory: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 24}
    expected = generate(LLM(str(mixed), dtype="float32", **memory))
    lack(monkeypatch)
    with caplog.at_level(logging.INFO):
        llm = LLM(str(mixed), **memory, **settings)
        output = generate(llm)
        generate(llm)
    timings = run_timings(llm.core, output, None)
    assert timings["backend"] == backend
    assert timings["fallback_ops"] == fallback
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == (1 if fallback else 0)
    assert all(f"no fast kernel for: {', '.join(fallback)}" in text for text in said)
    if settings:
        assert logprobs(output) == logprobs(expected), "float32 was asked for"
    elif output.outputs[0].token_ids == expected.outputs[0].token_ids:
        assert logprobs(output) == pytest.approx(logprobs(expected), abs=0.3)


def test_a_shape_that_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(str(write_tiny(tmp_path, SEED)), kv_cache_dtype="bfloat16")
    (output,) = llm.generate([1, 2, 3], PARAMS, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 7
    assert run_timings(llm.core, output, None)["fallback_ops"] == ["head_dim 8"]
    assert [record.getMessage() for record in caplog.records] == [
        "the slow reference runs this model; no fast kernel for: head_dim 8"
    ]


def test_a_packed_cache_is_not_forgotten_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model").mkdir()
    LLM(str(write_tiny(tmp_path / "model", SEED)), packed_cache=tmp_path / "copies").close()
    (record,) = caplog.records
    assert record.getMessage().endswith("no fast kernel for: head_dim 8; --packed-cache has no use")
