"""`tokenspeed verify`'s checks of a GPU's kernels, with those kernels in the interpreter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.triton.gpu_fakes import FakeLink
from tests.kernels.triton.test_invariant_engine import register_here
from tests.parity_tools import CASES, make_safetensors
from tests.seeds import SEED
from tokenspeed.bench.verify import kernels
from tokenspeed.bench.verify.backends import GpuRecords
from tokenspeed.bench.verify.drift import TIMES, layer_rows, walk_fast, walk_plain
from tokenspeed.bench.verify.kernels import check_kernels
from tokenspeed.bench.verify.plain import PlainOps
from tokenspeed.bench.verify.steps import Step, random_step, step_of
from tokenspeed.bench.verify.weights import HeldWeights
from tokenspeed.engine.llm import LLM
from tokenspeed.kernels.triton import attention_registration, dense, experts, linear
from tokenspeed.kernels.triton.attention_tiles import DecodeTile
from tokenspeed.kernels.triton.tiles import GemvTile
from tokenspeed.runner import build
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.executor import GpuExecutor
from tokenspeed.runner.gpu.link import TritonSteps

SETTINGS: dict[str, Any] = {
    "max_model_len": 64, "kv_cache_memory_bytes": 1 << 20, "block_size": 8, "max_num_seqs": 4, "device": "cpu",
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that hold much of a tiny model: each program costs the interpreter some milliseconds."""
    monkeypatch.setattr(attention_registration, "decode_tile", lambda *shape: DecodeTile(2, 16, 1, 1, 1))
    for module, name in ((linear, "gemv_tile"), (experts, "gate_up_tile"), (experts, "down_tile")):
        monkeypatch.setattr(module, name, lambda *shape: GemvTile(64, 64, 1))


def opened(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, mode: str | None, **settings: Any) -> LLM:
    """A model of one layer or two in bf16 by the GPU's runner, its weights narrowed by `mode`."""
    case = CASES[name]
    case = replace(case, settings=case.settings | {"num_hidden_layers": 2 if name == "gpt_oss" else 1})

    def choose(model: Any, config: Any, *rest: Any) -> GpuBackend:
        return GpuBackend(model, register=register_here, quantization=mode, batch_invariant=config.batch_invariant)

    def executor(backend: GpuBackend, arena: Any, max_num_seqs: int, max_len: int) -> GpuExecutor:
        steps = TritonSteps(backend.num_heads, 2, backend.batch_invariant)
        return GpuExecutor(backend, arena, steps, FakeLink(), max_num_seqs=max_num_seqs, max_len=max_len)

    with monkeypatch.context() as patch:
        patch.setattr(build, "choose_backend", choose)
        patch.setattr(build, "gpu_executor", executor)
        monkeypatch.setattr(kernels, "HEAD_ROWS", ())
        return LLM(str(make_safetensors(case, "F32", folder).path), **(SETTINGS | settings))


def backend_of(llm: LLM) -> GpuBackend:
    assert isinstance(llm.core.backend, GpuBackend)
    return llm.core.backend


def small_steps(llm: LLM, *rows: Sequence[tuple[int, int]]) -> list[Step]:
    rng = random.Random(SEED)
    return [random_step(f"{each}", each, llm.core.page_shape, CPU, llm.core.vocab_size, rng) for each in rows]


def test_a_broken_kernel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right at first; then the registry offers one that leaves a column out."""
    llm = opened(monkeypatch, tmp_path, "qwen3-tied", None)
    backend = backend_of(llm)
    weights = HeldWeights(backend.weights)
    rows, plain = check_kernels(GpuRecords(backend), weights, small_steps(llm, [(9, 1)]), SEED)
    assert [row.name for row in rows if not row.ok] == [], SEED
    assert plain == []
    found = {row.name.split()[0] for row in rows}
    assert found >= {"embed", "norm_linear", "qk_norm_rope_write", "attention", "linear", "join_norm_linear_act"}

    def short(view: Any, record: Any, inputs: Any, weights: Any) -> Any:
        y, *others = dense.run_projection(view, record, inputs, weights)
        return y.clone().index_fill_(1, torch.tensor([y.shape[1] - 1]), 0), *others

    backend.run_instead({"join_norm_linear_act": short})
    rows, _ = check_kernels(GpuRecords(backend), weights, small_steps(llm, [(7, 1)]), SEED)
    assert [row.by for row in rows if not row.ok] == ["instead of triton.join_norm_linear_act"], SEED


@pytest.mark.slow
def test_a_kernel_that_writes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = opened(monkeypatch, tmp_path, "qwen3-tied", None)
    backend = backend_of(llm)
    (write,) = (p for p in backend.plan_for(1).steps if p.record.op == "qk_norm_rope_write")

    def stray(view: Any, record: Any, inputs: Any, weights: Any) -> Any:
        view.kv.view(torch.uint8)[view.block_tables[0, 0, 0].long(), 0, 0, 0] += 1
        return write.implementation.run(view, record, inputs, weights)

    backend.run_instead({"qk_norm_rope_write": stray})
    rows, _ = check_kernels(GpuRecords(backend), HeldWeights(backend.weights), small_steps(llm, [(17, 1)]), SEED)
    (bad,) = (row for row in rows if not row.ok)
    assert "entries of other tokens changed" in bad.where


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode", "kv", "invariant"),
    [
        ("qwen3_moe", "fp8", "fp8", False),
        ("gpt_oss", None, "auto", False),
        ("llama", "int8", "auto", False),
        ("qwen3-tied", None, "auto", True),
    ],
)
def test_formats_and_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: str | None, kv: str, invariant: bool
) -> None:
    llm = opened(monkeypatch, tmp_path, name, mode, kv_cache_dtype=kv, batch_invariant=invariant)
    backend = backend_of(llm)
    steps = small_steps(llm, [(33, 1)], [(0, 1), (17, 1), (40, 1)], [(0, 60), (7, 1), (3, 9)])
    monkeypatch.setattr(kernels, "HEAD_ROWS", (1, 5))
    rows, plain = check_kernels(GpuRecords(backend), HeldWeights(backend.weights), steps, SEED)
    assert ([row.text() for row in rows if not row.ok], plain) == ([], []), SEED


@pytest.mark.slow
def test_drift_of_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = opened(monkeypatch, tmp_path, "qwen3-tied", None)
    backend, program = backend_of(llm), llm.core.model.program
    weights, rng = HeldWeights(backend.weights), random.Random(SEED)
    tokens = [[rng.randrange(llm.core.vocab_size) for _ in range(length)] for length in (9, 4)]

    def whole(dtype: torch.dtype) -> Step:
        shape = replace(llm.core.page_shape, dtype=dtype)
        return step_of("whole", tokens, [0, 0], shape, CPU, random.Random(0))

    exact = walk_plain(PlainOps(weights, torch.float64), program, whole(torch.float32))
    plain = walk_plain(PlainOps(weights, torch.bfloat16), program, whole(torch.bfloat16))
    fast = walk_fast(GpuRecords(backend), whole(torch.bfloat16))
    (row,) = layer_rows(exact, plain, fast, "gpu", TIMES["gpu"], routed=False)
    assert row.ok, row.text()
    assert row.figures[0].measured > 1e-4
