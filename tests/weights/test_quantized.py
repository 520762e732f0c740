"""A model's matrices quantised at load: which format each gets, that values are the packer's, what is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.contracts.errors import ConfigError, WeightError
from tokenspeed.quantization.groups import MODES
from tokenspeed.quantization.pack import pack
from tokenspeed.weights import quantized
from tokenspeed.weights.dummy import dummy_weights
from tokenspeed.weights.packed import PackedTensor, Weight
from tokenspeed.weights.quantized import quantize_weights
from tokenspeed.weights.spec import WeightSpec, WeightTable


def table() -> WeightTable:
    made = WeightTable()
    for name, shape, kind in (
        ("embed", (101, 64), "embedding"),
        ("layers.0.qkv", (37, 64), "linear"),
        ("layers.0.down", (64, 48), "linear"),
        ("norm", (64,), "vector"),
        ("lm_head", (101, 64), "linear"),
        ("layers.0.router", (5, 64), "router"),
        ("layers.0.experts_down", (3, 17, 64), "experts"),
    ):
        made.add(WeightSpec(name, shape, kind, (), ()))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("elements", [64 * 5, 1 << 22])
def test_formats_and_values(
    mode: str, fmt: str, elements: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quantized, "TASK_ELEMENTS", elements)
    weights = dummy_weights(table(), fmt, seed=SEED)
    with caplog.at_level(logging.WARNING, "tokenspeed"):
        made = quantize_weights(weights, mode)
    wanted = {"embed": "Q8_0", "lm_head": "Q8_0"} | dict.fromkeys(
        ("layers.0.qkv", "layers.0.experts_down"), MODES[mode]
    )
    for name, weight in made.items():
        if name not in wanted:
            assert weight is weights[name]
            continue
        assert weight.formats == (wanted[name],)
        assert weight.shape == weights[name].shape
        expected = pack(weights[name].unpacked(torch.float32).flatten(0, -2), wanted[name])
        assert (weight.segments[0].data == expected).all()
    assert [record.getMessage() for record in caplog.records] == [
        f"--quantization {mode}: 1 matrices keep their format, layers.0.down with 48 columns first (no multiple of 32)"
    ]


def test_segments_stay_apart() -> None:
    weights = dummy_weights(table(), "F32", seed=SEED)
    (whole,) = weights["layers.0.qkv"].segments
    halves = [PackedTensor(whole.data[:20], "F32", 20, 64), PackedTensor(whole.data[20:], "F32", 17, 64)]
    weights["layers.0.qkv"] = Weight(weights["layers.0.qkv"].spec, halves)
    made = quantize_weights(weights, "int4")["layers.0.qkv"]
    assert [segment.rows for segment in made.segments] == [20, 17]
    assert (made.unpacked(torch.float32) - weights["layers.0.qkv"].unpacked(torch.float32)).abs().max() < 0.01


@pytest.mark.parametrize("mode", MODES)
def test_quantised_weights_are_refused_by_name(mode: str) -> None:
    changes: dict[str, Any] = {"layers.0.qkv": "Q4_1"}
    weights = dummy_weights(table(), changes, seed=SEED)
    with pytest.raises(ConfigError, match=rf"--quantization {mode}: weight layers.0.qkv is quantised already \(Q4_1\)"):
        quantize_weights(weights, mode)


def test_values_that_cannot_be_are_refused_by_name() -> None:
    weights = dummy_weights(table(), "F32", seed=SEED)
    weights["layers.0.qkv"].segments[0].data.view(torch.float32)[36, 3] = torch.inf
    with pytest.raises(WeightError, match=r"weight layers.0.qkv: values that are not finite"):
        quantize_weights(weights, "int8")
