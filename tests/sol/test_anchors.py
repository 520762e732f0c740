"""Published floors that are not a decode step of one GPU, and floors against what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tokenspeed.bench.record import read
from tokenspeed.bench.report.floors import draw, draw_parts, shares
from tokenspeed.bench.report.roofline import floor_of
from tokenspeed.cli.main import main
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.observability.ceilings import Ceilings
from tokenspeed.sol.report import step_report

ROOT = Path(__file__).resolve().parents[2]
PREFILL = [("llama-3.2-1b", "none", 2.7), ("llama-3.1-8b", "none", 18.9), ("llama-3.1-8b", "fp8", 10.5)]
LONG = [(8192, 1.98), (32768, 2.68)]


@pytest.mark.parametrize("model, quantization, milliseconds", PREFILL)
def test_prompts_of_1024(model: str, quantization: str, milliseconds: float) -> None:
    """The published ones count attention by its bytes alone; `sol` counts its operations, which take longer."""
    found = step_report(model, "H200", 1, 1024, quantization, prefill=True)
    attention = found.by_op["attention"]
    by_bytes = attention.cost.bytes / 4600e9
    assert attention.seconds > by_bytes
    assert (found.total.seconds - attention.seconds + by_bytes) * 1e3 == pytest.approx(milliseconds, rel=0.02)
    assert found.total.seconds * 1e3 == pytest.approx(milliseconds, rel=0.04)
    assert found.total.bound == "compute"
    assert found.summary()["tok_s"] == pytest.approx(1024 / found.total.seconds)
    assert "a prompt, batch 1" in found.text()


def test_a_prompt_counted_by_hand() -> None:
    """Qwen3-8B, two prompts of 64: every weight of a layer twice per token; the head for the two last tokens alone."""
    d, ff, vocab, kv = 4096, 12288, 151936, 1024
    layer = (d + 2 * kv) * d + d * d + 3 * ff * d
    by_op = step_report("qwen3-8b", "H200", 2, 64, "none", prefill=True).by_op
    assert by_op["linear"].cost.flops == 2 * (128 * 36 * layer + 2 * vocab * d)


@pytest.mark.parametrize("context, milliseconds", LONG)
def test_long_contexts_of_fp8_weights(context: int, milliseconds: float) -> None:
    found = step_report("llama-3.1-8b", "H200", 1, context, "fp8")
    assert found.total.seconds * 1e3 == pytest.approx(milliseconds, rel=0.02)


@pytest.mark.parametrize("gb_s, tok_s", [(34.6, 140), (37.9, 154)])
def test_the_demo_model_on_a_processor(monkeypatch: pytest.MonkeyPatch, gb_s: float, tok_s: float) -> None:
    """The plain head; what the screened head reads depends on the hidden state, so it has no floor by shapes."""
    monkeypatch.setattr("tokenspeed.sol.report.ceilings_for", lambda gpu: Ceilings("here", gb_s))
    found = step_report(None, None, 1, 16, "none")
    assert found.total.cost.weight_bytes == pytest.approx(246.6e6, rel=0.001)
    assert found.summary()["tok_s"] == pytest.approx(tok_s, rel=0.02)


def test_no_measured_row_beats_its_floor() -> None:
    """And the floor in each decode row is that of `sol`, but for the read bandwidth that its run has measured."""
    records = read(ROOT / "benchmarks/results/h200.json")
    assert [each.id for each in records if each.unit == "ms" and each.floor and each.value < each.floor] == []
    found = {each.id: (each, floor_of(each)) for each in records}
    steps = {id: (each, step) for id, (each, step) in found.items() if step is not None}
    assert len(steps) >= 16
    for id, (each, step) in steps.items():
        milliseconds = step.total.seconds * 1e3
        assert each.floor is not None, id
        assert each.value > milliseconds, id
        assert each.floor == pytest.approx(milliseconds, rel=0.03), id


def test_a_curve_is_made_of_steps() -> None:
    found = step_report("llama-3.1-8b", "H100", 1, 8192, "none", within_ms=9.0, curve=True)
    assert found.fit is not None
    assert list(found.curve) == [1, 2, 4, 8, 16, 32, found.fit.sequences]
    for batch, floors in found.curve.items():
        assert floors == step_report("llama-3.1-8b", "H100", batch, 8192, "none").by_op
    parts = shares(found)
    assert set(parts) == {"attention", "linear", "other"}
    assert sum(each[0] for each in parts.values()) == pytest.approx(found.total.seconds * 1e3)


def test_pictures_of_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["sol", "qwen3-8b", "--gpu", "B200", "--within", "9"]
    assert main([*flags, "--plot", str(tmp_path / "a.png")]) == 0
    assert "within 9 ms a token" in capsys.readouterr().out
    draw(step_report("qwen3-8b", "B200", 1, 1024, "none", within_ms=9.0, curve=True), tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


@pytest.mark.parametrize("within_ms, lines", [(9.0, 1), (900.0, 0)])
def test_a_far_limit_leaves_the_steps_their_height(within_ms: float, lines: int) -> None:
    found = step_report("llama-3.1-8b", "H100", 1, 8192, "none", within_ms=within_ms, curve=True)
    axes = Figure().subplots()
    draw_parts(axes, found)
    highest = max(map(sum, zip(*shares(found).values(), strict=True)))
    assert highest < axes.get_ylim()[1] < 3 * highest
    assert len(axes.lines) == lines
    assert [text.get_text().partition(":")[0] for text in axes.texts] == [f"{within_ms:g} ms"]


def test_a_config_file_stands_for_its_folder(tmp_path: Path) -> None:
    text = '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, '
    text += '"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, '
    text += '"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false}'
    (tmp_path / "config.json").write_text(text)
    by_file, by_folder = (step_report(str(each), "H200", 1, 8, "none") for each in (tmp_path / "config.json", tmp_path))
    assert by_file.total == by_folder.total


def test_flags_that_contradict_each_other() -> None:
    for flags in ({"within_ms": 5.0}, {"curve": True}):
        with pytest.raises(ConfigError, match="are about decoding: leave out --prefill"):
            step_report("llama-3.2-1b", "H200", 1, 8, "none", prefill=True, **flags)
