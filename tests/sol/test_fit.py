"""What fits a device, against hand-computed cases."""

from __future__ import annotations

import pytest

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.observability import ceilings
from tokenspeed.sol.fit import Fit, most_within
from tokenspeed.sol.report import step_report


def test_room_counted_by_hand() -> None:
    """Qwen3-8B in bf16: every weight once, head beside embedding; 1025 tokens of 36 layers of 8 heads of 128."""
    d, ff, vocab, kv = 4096, 12288, 151936, 1024
    layer = (d + 2 * kv) * d + d * d + 3 * ff * d
    held = 2 * (36 * layer + 2 * vocab * d) + 4 * (36 * (2 * d + 2 * 128) + d)
    each = 36 * 2 * kv * 2 * 1025
    fit = step_report("qwen3-8b", "H200", 4, 1024, "none").fit
    assert fit is not None
    assert (fit.weight_bytes, fit.sequence_bytes, fit.usable_bytes) == (held, each, 0.9 * 141e9)
    assert fit.sequences == int((0.9 * 141e9 - held) // each) == 731
    assert f"room for {fit.sequences} such sequences" in fit.text()
    assert "within_ms" not in fit.summary()


@pytest.mark.parametrize("gpu", ["H200", "H100", "B200", "MI350X"])
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_the_most_sequences_within_a_time(gpu: str, quantization: str) -> None:
    found = step_report("llama-3.1-8b", gpu, 1, 2048, quantization, within_ms=9.0)
    assert found.fit is not None
    most = found.fit.within
    assert 0 < most < found.fit.sequences
    assert found.summary()["sequences_within"] == most
    slower, slow = (step_report("llama-3.1-8b", gpu, n, 2048, quantization).total.seconds for n in (most + 1, most))
    assert slow <= 9e-3 < slower


def test_a_search_asks_for_no_more_than_there_is_room_for() -> None:
    asked: list[int] = []

    def step_ms(sequences: int) -> float:
        asked.append(sequences)
        return float(sequences)

    for most, limit in ((0, 5.0), (7, 0.5), (7, 3.0), (7, 99.0), (8, 8.0)):
        assert most_within(limit, most, step_ms) == min(most, int(limit))
    assert max(asked) <= 8


def test_what_does_not_fit_is_said() -> None:
    assert Fit(2e9, 1e6, 1e9).sequences == 0
    assert Fit(2e9, 1e6, 1e9).text() == "does not fit: 2.0 GB of weights, 1.0 GB may be used"
    tight = Fit(1e9, 3e8, 1.9e9)
    assert tight.sequences == 3


def test_a_time_wants_a_machine_whose_memory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ceilings.Ceilings("here", 30.0)
    monkeypatch.setattr("tokenspeed.sol.report.ceilings_for", lambda gpu: here)
    assert step_report("llama-3.2-1b", None, 1, 128, "none").fit is None
    with pytest.raises(ConfigError, match="--within needs a machine whose memory is known"):
        step_report("llama-3.2-1b", None, 1, 128, "none", within_ms=5.0)


@pytest.mark.parametrize("milliseconds", [0.0, -1.0])
def test_a_time_is_more_than_none(milliseconds: float) -> None:
    with pytest.raises(ConfigError, match="--within must be more than 0 ms"):
        step_report("llama-3.2-1b", "H200", 1, 128, "none", within_ms=milliseconds)
