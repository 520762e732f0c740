"""Floors against hand-computed cases and the published ones, and plan against sol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.quantization.groups import gpu_bytes
from tokenspeed.sol.floor import ceilings_for, decode_work, stored_bytes, total
from tokenspeed.sol.plan_table import plan_table
from tokenspeed.sol.report import find_definition, floors_by_op, step_report

ANCHORS = [
    ("llama-3.2-1b", "none", 0.545),
    ("llama-3.1-8b", "none", 3.29),
    ("llama-3.1-8b", "fp8", 1.775),
    ("llama-3.1-8b", "int4", 1.04),
    ("qwen3-8b", "none", 3.32),
    ("qwen3-8b", "fp8", 1.81),
]
BATCHED = [
    ("llama-3.2-1b", "none", {8: 0.60, 32: 0.77, 128: 1.47}),
    ("llama-3.1-8b", "none", {8: 3.50, 32: 4.20, 128: 7.00}),
    ("llama-3.1-8b", "fp8", {8: 1.98, 32: 2.68, 128: 5.48}),
    ("qwen3-30b-a3b", "none", {1: 1.34, 8: 5.79, 32: 12.24, 128: 15.94}),
    ("qwen3-30b-a3b", "fp8", {1: 0.75, 8: 3.05, 32: 6.54, 128: 9.44}),
    ("gpt-oss-20b", "none", {1: 0.81, 8: 2.03, 32: 2.90, 128: 3.52}),
]


@pytest.mark.parametrize("model, quantization, milliseconds", ANCHORS)
def test_batch_one_floors(model: str, quantization: str, milliseconds: float) -> None:
    report = step_report(model, "H200", 1, 1024, quantization)
    assert report.total.seconds * 1e3 == pytest.approx(milliseconds, rel=0.02)
    assert report.total.bound == "memory"


@pytest.mark.parametrize("model, quantization, floors", BATCHED)
def test_batched_floors(model: str, quantization: str, floors: dict[int, float]) -> None:
    for batch, milliseconds in floors.items():
        report = step_report(model, "H200", batch, 1024, quantization)
        assert report.total.seconds * 1e3 == pytest.approx(milliseconds, rel=0.02)


def test_experts_in_4_bits_counted_by_hand() -> None:
    """gpt-oss-20b: 17 bytes for 32 weights of experts, 4 of 32 of which one token reads; on a GPU whole runs of 128."""
    found = step_report("gpt-oss-20b", "H200", 1, 10, "none").by_op["experts"].cost.weight_bytes
    biases = 4 * (2 * 2880 + 2880)
    assert found == pytest.approx(24 * 4 * (3 * 2880 * 2880 * 17 / 32 + biases))
    _, definition, _ = find_definition("gpt-oss-20b")
    held = sum(gpu_bytes("mxfp4", s.rows, s.cols) for s in definition.weights.specs.values() if s.kind == "experts")
    assert held == 24 * 32 * 3 * 2880 * 23 * 68


@pytest.mark.parametrize("mode", ["fp8", "int8", "int4", "mxfp4"])
def test_experts_in_4_bits_are_not_quantised_again(mode: str) -> None:
    _, definition, _ = find_definition("gpt-oss-20b")
    with pytest.raises(ConfigError, match=rf"--quantization {mode}: .*quantised already \(.* 'mxfp4'\)"):
        stored_bytes(definition.weights, None, mode, gpu=True)


def test_experts_counted_by_hand() -> None:
    """Qwen3-30B-A3B with three tokens: 128 (1 - (15 / 16)^3) experts of each layer."""
    cost = step_report("qwen3-30b-a3b", "H200", 3, 10, "none").by_op["experts"].cost
    assert cost.weight_bytes == pytest.approx(48 * 128 * (1 - (120 / 128) ** 3) * 3 * 768 * 2048 * 2)
    assert cost.flops == 48 * 3 * 8 * 2 * 3 * 768 * 2048


@pytest.mark.parametrize("context, milliseconds", [(8192, 3.50), (32768, 4.20)])
def test_long_context_floors(context: int, milliseconds: float) -> None:
    report = step_report("llama-3.1-8b", "H200", 1, context, "none")
    assert report.total.seconds * 1e3 == pytest.approx(milliseconds, rel=0.02)


def test_bytes_counted_by_hand() -> None:
    """Qwen3-8B: 36 layers of qkv, o, gate/up, down, norms; the head; one embedding row; 1024 tokens of KV."""
    d, ff, vocab, kv = 4096, 12288, 151936, 1024
    layer = (d + 2 * kv) * d + d * d + 3 * ff * d
    weights = 2 * (36 * layer + vocab * d + d) + 4 * (36 * (2 * d + 2 * 128) + d)
    report = step_report("qwen3-8b", "H200", 1, 1024, "none")
    assert report.total.cost.weight_bytes == weights
    assert report.total.cost.kv_bytes == 36 * 2 * kv * 2 * (1024 + 1)


def test_window_bounds_the_kv_that_is_read() -> None:
    """15 of 18 layers of the demo model see 512 tokens at most."""
    short = step_report("gemma-3-270m", "H200", 1, 512, "none").by_op["attention"].cost.kv_bytes
    long = step_report("gemma-3-270m", "H200", 1, 4096, "none").by_op["attention"].cost.kv_bytes
    per_token = 2 * 256 * 2
    assert short == 18 * 512 * per_token
    assert long == (15 * 512 + 3 * 4096) * per_token


PLAIN = ("llama-3.2-1b", "llama-3.1-8b", "qwen3-8b", "gemma-3-270m", "qwen3-30b-a3b")


@pytest.mark.parametrize(
    "model, batch, quantization",
    [
        *((model, *step) for model in PLAIN for step in ((1, "none"), (1, "fp8"), (300, "none"), (1024, "fp8"))),
        ("gpt-oss-20b", 1, "none"),
        ("gpt-oss-20b", 300, "none"),
    ],
)
def test_plan_rows_add_up_to_sol(model: str, batch: int, quantization: str) -> None:
    report = step_report(model, "H200", batch, 700, quantization)
    table = plan_table(model, "H200", batch, 700, quantization)
    assert table.total.seconds == pytest.approx(report.total.seconds, rel=1e-9)
    assert table.total.cost.bytes == pytest.approx(report.total.cost.bytes, rel=1e-12)
    assert table.total.cost.flops == pytest.approx(report.total.cost.flops, rel=1e-12)


@pytest.mark.parametrize("mode, per_group", [("int8", 34), ("int4", 20)])
def test_group_quantization_counted_by_hand(mode: str, per_group: int) -> None:
    """Qwen3-8B: the head at 34 bytes per 32 weights, one embedding row too, norms in float32."""
    d, ff, vocab, kv = 4096, 12288, 151936, 1024
    layer = (d + 2 * kv) * d + d * d + 3 * ff * d
    weights = 36 * layer // 32 * per_group + (vocab * d + d) // 32 * 34 + 4 * (36 * (2 * d + 2 * 128) + d)
    _, definition, _ = find_definition("qwen3-8b")
    work = decode_work(1, 1024, stored_bytes(definition.weights, None, mode))
    floors = floors_by_op(definition.program(), work, ceilings_for("H200"), False)
    assert total(list(floors.values())).cost.weight_bytes == weights


@pytest.mark.parametrize("mode, per_weight, per_row", [("int8", 1, 4), ("int4", 66 / 128, 0), ("mxfp4", 68 / 128, 0)])
def test_quantization_of_a_gpu_counted_by_hand(mode: str, per_weight: float, per_row: int) -> None:
    """Qwen3-8B: projections; the head and one embedding row in bf16, norms in float32. Nothing is multiplied in fp8."""
    d, ff, vocab, kv = 4096, 12288, 151936, 1024
    layer, rows = (d + 2 * kv) * d + d * d + 3 * ff * d, d + 2 * kv + d + 2 * ff + d
    weights = 36 * (layer * per_weight + rows * per_row) + 2 * (vocab * d + d) + 4 * (36 * (2 * d + 2 * 128) + d)
    report, table = (made("qwen3-8b", "H200", 1, 1024, mode) for made in (step_report, plan_table))
    assert report.total.cost.weight_bytes == table.total.cost.weight_bytes == weights
    plain, packed = (step_report("qwen3-8b", "H200", 4096, 8, each).by_op["linear"] for each in ("none", mode))
    assert plain.bound == packed.bound == "compute"
    assert plain.cost.flops == packed.cost.flops
    assert packed.seconds == pytest.approx(plain.seconds, rel=0.01)


@pytest.mark.parametrize("kv, entry", [("float32", 512), ("fp8", 128), ("fp8_e4m3", 128), ("int8", 136)])
def test_kv_types_counted_by_hand(kv: str, entry: int) -> None:
    """Qwen3-8B: 36 layers, 8 heads of 128, keys and values; 1024 tokens read and one written."""
    report = step_report("qwen3-8b", "H200", 1, 1024, "none", kv)
    assert report.total.cost.kv_bytes == pytest.approx(36 * 8 * 2 * 1025 * entry, rel=1e-12)
    assert report.summary()["kv_cache_dtype"] == kv


def test_compute_binds_at_many_rows() -> None:
    by_op = step_report("llama-3.1-8b", "H200", 1024, 16, "none").by_op
    assert by_op["linear"].bound == "compute"
    assert by_op["linear"].seconds == pytest.approx(2 * 1024 * 7.504e9 / 770e12, rel=0.01)


def test_stored_formats_of_a_checkpoint_count(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    with_weights = step_report(str(tmp_path), "H200", 1, 8, "none").total.cost.weight_bytes
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    from_config = step_report(str(tmp_path), "H200", 1, 8, "none").total.cost.weight_bytes
    assert with_weights == pytest.approx(2 * from_config, rel=0.02)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-3.1-8b", "H900", 1, 1, "none"), "H900.*known: H200, H100, B200, MI350X"),
        (("llama-3.1-8b", "H200", 0, 1, "none"), "--batch must be at least 1"),
        (("llama-3.1-8b", "H200", 1, 0, "none"), "--context must be at least 1"),
        (("llama-3.1-8b", "H200", 1, 1, "int3"), "--quantization must be one of none, fp8, int8, int4, mxfp4"),
        (("llama-3.1-8b", "H200", 1, 1, "none", "int4"), "--kv-cache-dtype must be one of bfloat16, .*got 'int4'"),
    ],
)
def test_bad_flags_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        step_report(*arguments)


def test_unmeasured_machine_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="doctor --measure"):
        ceilings_for(None)
