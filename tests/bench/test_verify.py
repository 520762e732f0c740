"""`tokenspeed verify` on a CPU: it passes on a small model, and names a kernel, a weight or an answer that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity_tools import CASES, make_safetensors
from tests.seeds import SEED
from tokenspeed.bench.verify import run
from tokenspeed.bench.verify.kernels import errors
from tokenspeed.bench.verify.run import run_verify
from tokenspeed.bench.verify.table import Figure, Report, Row
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.program.program import Record
from tokenspeed.runner.cpu_backend import CpuBackend

SMALL: dict[str, Any] = {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 20, "block_size": 8, "max_num_seqs": 8}
FAMILIES = ("gemma2", "gpt_oss", "glm4_moe-groups", "qwen3_moe")
PARTS = ["kernels against float64", "drift after each layer", "log-probabilities", "batch invariance"]
Ran = tuple[int, dict[str, Any]]


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """verify(case, **settings) gives the exit status and the table."""
    monkeypatch.setattr(run, "REQUESTS", 4)
    monkeypatch.setattr(run, "LONGEST", 40)

    def ran(name: str, **settings: Any) -> Ran:
        model = make_safetensors(CASES[name], "F32", tmp_path).path
        out = tmp_path / "table.json"
        status = run_verify({"model": str(model)} | SMALL | settings, SEED, out)
        return status, json.loads(out.read_text())

    return ran


def broken(table: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row["part"], row["name"]) for row in table["rows"] if not row["ok"]]


def test_a_small_model_passes(verify: Callable[..., Ran], capsys: pytest.CaptureFixture[str]) -> None:
    status, table = verify("qwen3", quantization="int8", kv_cache_dtype="int8")
    assert (status, table["ok"], broken(table)) == (0, True, []), table["data-seed"]
    assert list(dict.fromkeys(row["part"] for row in table["rows"])) == PARTS
    names = " ".join(row["name"] for row in table["rows"])
    for op in ("embed", "attention", "qk_norm_rope_write", "norm_linear_act", "int8 weights for the original's"):
        assert op in names
    layers = [row for row in table["rows"] if row["part"] == PARTS[1]]
    assert len(layers) == CASES["qwen3"].settings["num_hidden_layers"]
    assert all(figure["measured"] <= figure["bound"] for row in table["rows"] for figure in row["figures"])
    assert f"{len(table['rows'])} checks, none broken" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_pass(verify: Callable[..., Ran], name: str) -> None:
    status, table = verify(name)
    assert (status, broken(table)) == (0, []), table["data-seed"]


def test_a_broken_kernel_is_named(verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ walk, told of a wrong epsilon in one kind of record."""
    made = CpuBackend._op

    def wrong(self: CpuBackend, record: Record) -> Any:
        op = made(self, record)
        if record.op.endswith("norm_linear_act"):
            op.eps = 0.5
        return op

    monkeypatch.setattr(CpuBackend, "_op", wrong)
    status, table = verify("llama")
    kernels = [name for part, name in broken(table) if part == PARTS[0]]
    assert (status, table["ok"]) == (1, False)
    assert [name.split()[0] for name in kernels] == ["join_norm_linear_act"]
    assert {part for part, _ in broken(table)} >= {PARTS[1], PARTS[2]}


def test_a_weight_that_is_read_wrongly_shows_in_its_layer(
    verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is right, given another layer's norm."""
    made = CpuBackend._op

    def wrong(self: CpuBackend, record: Record) -> Any:
        op = made(self, record)
        if "layers.2.mlp_norm" in record.weights:
            op.norm = self._vectors["layers.0.attn_norm"]
        return op

    monkeypatch.setattr(CpuBackend, "_op", wrong)
    status, table = verify("llama")
    assert status == 1
    assert [name for part, name in broken(table) if part == PARTS[1]] == ["layer 2"]


def test_answers_that_depend_on_others(verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    made = CpuBackend.logits

    def wrong(self: CpuBackend, rows: Any) -> torch.Tensor:
        return made(self, rows) * (1 + 1e-6 * len(rows))

    monkeypatch.setattr(CpuBackend, "logits", wrong)
    status, table = verify("llama")
    assert status == 1
    assert {part for part, _ in broken(table)} == {PARTS[3]}


def test_no_fast_kernel(verify: Callable[..., Ran]) -> None:
    status, table = verify("llama", dtype="float32")
    assert status == 0
    assert {row["part"] for row in table["rows"]} == {PARTS[2]}
    assert len(table["notes"]) == 2


def test_a_table_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "verify", lambda settings, seed: Report({}))
    with pytest.raises(ConfigError, match="nowhere"):
        run_verify({}, 0, tmp_path / "nowhere" / "table.json")
    assert run_verify({}, 0, tmp_path / "table.json") == 1, "nothing was checked"


def test_figures() -> None:
    assert Figure("", 1.0, 1.0).ok
    assert not Figure("", 1.01, 1.0).ok
    bad = Row("part", "name", "by", "where", (Figure("a", float("nan"), 1.0), Figure("b", float("inf"), 1.0)))
    assert not bad.ok
    assert [f["measured"] for f in bad.as_json()["figures"]] == [None, None]
    exact = torch.tensor([[3.0, 4.0], [30.0, -40.0]])
    rms, largest = errors(exact + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), exact)
    assert rms == pytest.approx((0.02 / 4) ** 0.5)
    assert largest == pytest.approx(0.5 / (4 + 12.5**0.5))
    assert errors(torch.tensor([[float("nan"), 1.0]]), exact[:1])[1] == float("inf")
