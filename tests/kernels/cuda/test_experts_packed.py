"""The kernels of MXFP4 experts compile for Hopper and Blackwell without spills and wait where they must; what they
take. What they compute: `test_experts_packed_emulated.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.cuda.nvrtc import compile_
from tests.seeds import SEED
from tokenspeed.bench.gpu.expert_cases import ExpertCase
from tokenspeed.kernels.cuda import experts_tall, registration
from tokenspeed.kernels.cuda.experts_packed import ALL_SHARED, MOST_TOKENS, Variant, stream_packed, variant
from tokenspeed.kernels.registry import Registry, Situation
from tokenspeed.kernels.triton import expert_registration
from tokenspeed.ops.definitions import Operands
from tokenspeed.quantization import fp8, mxfp4

SHAPES = [(32, 4, 2880, 2880), (128, 8, 2048, 768), (128, 4, 5120, 8192)]
"""Experts, choices of a token, hidden and inner columns."""


def both(tokens: int, shape: tuple[int, ...], act: str = "swiglu_clamped", bias: bool = True) -> list[Variant]:
    experts, choices, hidden, ff = shape
    up = variant(tokens, experts, choices, hidden, ff, act, bias)
    given = up, variant(tokens, experts, choices, ff, hidden, "none", bias)
    return [each for each in given if each is not None]


def check(found: Variant, architecture: str = "sm_90a") -> None:
    log, ptx = compile_("experts_packed", found.defines(), architecture)
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    assert ptx.count("griddepcontrol.wait") == 1
    wait, start, copy = (
        ptx.index(each) for each in ("griddepcontrol.wait", "griddepcontrol.launch", "cp.async.bulk.tensor.5d")
    )
    # Down has its weights on their way before it waits; gate and up lets it start only once the router has ended.
    assert start < copy < wait if found.down else wait < start < copy
    # Of a run two products for each block, unrolled; codes are never converted.
    runs = found.step if architecture == "sm_90a" else 2
    assert ptx.count("mma.sync.aligned.m16n8k16.row.col.f32.bf16") == 8 * runs
    assert "cvt.rn.f16" not in ptx


@pytest.mark.parametrize("tokens", [1, 8])
def test_gpt_oss(tokens: int) -> None:
    found = both(tokens, SHAPES[0])
    assert [each.down for each in found] == [False, True]
    for each in found:
        check(each)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(("act", "bias"), [("swiglu_clamped", True), ("silu", False), ("gelu_tanh", True)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 17, 64])
def test_every_variant(tokens: int, shape: tuple[int, ...], act: str, bias: bool, architecture: str) -> None:
    found = both(tokens, shape, act, bias)
    assert [each.down for each in found] == [False, True]
    for each in found:
        check(each, architecture)


def test_programs_fit_a_processor() -> None:
    found = [each for tokens in range(1, MOST_TOKENS + 1) for shape in SHAPES for each in both(tokens, shape)]
    assert len(found) > 100
    for each in found:
        assert each.programs * (each.shared + 1024) <= ALL_SHARED
        assert each.stages >= 2
        assert each.step * 16 * 4 % 128 == 0  # where copies of exponents go
        assert each.warps // each.team < 16  # barriers that a program has


def test_what_no_tile_fits_is_left_to_the_twin() -> None:
    g = torch.Generator().manual_seed(SEED)
    taken = ExpertCase(3, 2, 256, 128, fmt="mxfp4")
    for fmt in ("plain", "channel"):
        case = replace(taken, fmt=fmt)
        assert stream_packed(*case.choices(1, g), case.random(g)) is None
    x, ids, shares = taken.choices(MOST_TOKENS + 1, g)
    given = taken.random(g)
    assert stream_packed(x, ids, shares, given) is None
    assert stream_packed(x[:1].float(), ids[:1], shares[:1], given) is None
    assert stream_packed(x.new_zeros(1, 264)[:, 4:260], ids[:1], shares[:1], given) is None
    assert variant(1, 64, 17, 256, 128, "none", False) is None  # more choices than warps
    assert variant(1, 3, 2, 256, 124, "silu", False) is None
    assert variant(1, 3, 2, 256, 120, "none", False) is None
    assert variant(1, 3, 2, 252, 128, "silu", False) is None


def test_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "usable", lambda: True)
    registry = Registry()
    expert_registration.register(registry)
    registration.register(registry)
    attrs = {"act": "silu", "alpha": 0.0, "limit": 0.0}
    shapes = ((32, 512, 256), (32, 256, 256))
    operands = Operands(((1, 256), (1, 4), (1, 4)), ((1, 256),), ("gate_up", "down"), shapes, attrs)
    for stored, hopper, most in (
        ((mxfp4.FORMAT,), False, MOST_TOKENS),
        ((fp8.FORMAT,), False, registration.MOST_EXPERT_TOKENS),
        ((fp8.FORMAT,), True, experts_tall.MOST_TOKENS),
    ):
        monkeypatch.setattr(registration, "hopper", lambda hopper=hopper: hopper)
        formats = {"gate_up": stored, "down": stored}
        for tokens in (1, most, most + 1):
            found = registry.choose("experts", operands, Situation("cuda", "bfloat16", tokens, formats))
            assert found is not None
            assert found.name == ("cuda.experts" if tokens <= most else "triton.experts")
