"""The experts' kernels compile for Hopper and Blackwell without spills, and wait where they must."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.cuda.nvrtc import compile_
from tokenspeed.bench.gpu.expert_cases import ExpertCase
from tokenspeed.kernels.cuda import registration
from tokenspeed.kernels.cuda.experts import MOST_TOKENS, TAKEN, Variant, stream_experts, variant
from tokenspeed.kernels.cuda.stream_tiles import BITS, SHARED
from tokenspeed.kernels.triton.expert_operands import Experts

SHAPES = [(8, 2048, 768), (4, 2880, 2880), (8, 4096, 1536), (6, 2048, 1408), (2, 4096, 14336)]
"""Choices of a token, hidden and inner columns."""
PRODUCT = "mma.sync.aligned.m16n8k16.row.col.f32.bf16"


def check(found: Variant, architecture: str = "sm_90a") -> None:
    log, ptx = compile_("experts", found.defines(), architecture)
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    assert ptx.count("griddepcontrol.wait") == 1
    wait, start, copy = (
        ptx.index(each) for each in ("griddepcontrol.wait", "griddepcontrol.launch", "cp.async.bulk.sh")
    )
    # Down has its weights on their way before it waits; gate and up lets it start only once the router has ended.
    assert start < copy < wait if found.down else wait < start < copy
    assert PRODUCT in ptx
    # Codes are never converted; what is rounded are results, and x once.
    assert "e4m3" not in ptx
    assert "cvt.rn.f16" not in ptx


def fitting(tokens: int, shape: tuple[int, int, int], fmt: int) -> list[Variant]:
    choices, hidden, ff = shape
    both = variant(tokens, choices, hidden, ff, fmt, "silu"), variant(tokens, choices, ff, hidden, fmt, "none")
    return [each for each in both if each is not None]


@pytest.mark.parametrize("fmt", TAKEN)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_qwen3_30b(tokens: int, fmt: int) -> None:
    both = fitting(tokens, SHAPES[0], fmt)
    assert [each.down for each in both] == [False, True]
    for each in both:
        check(each)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("fmt", TAKEN)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", range(1, MOST_TOKENS + 1))
def test_every_variant(tokens: int, shape: tuple[int, int, int], fmt: int, architecture: str) -> None:
    both = fitting(tokens, shape, fmt)
    whole_lines = all(columns * BITS[fmt] // 8 % 128 == 0 for columns in shape[1:])
    assert [each.down for each in both] == ([False, True] if whole_lines else [])
    for each in both:
        check(each, architecture)


def test_two_programs_fit_a_processor() -> None:
    found = [each for tokens in range(1, MOST_TOKENS + 1) for shape in SHAPES for fmt in TAKEN
             for each in fitting(tokens, shape, fmt)]  # fmt: skip
    assert len(found) > 50
    for each in found:
        assert each.shared <= SHARED
        assert each.stages >= 2
        assert each.k * BITS[each.format] // 8 % each.segment == 0
        assert each.rows * each.choices <= each.threads


def test_warps_have_as_much_to_do() -> None:
    """With one token of Qwen3-30B-A3B in bf16."""
    gate, down = fitting(1, SHAPES[0], TAKEN[0])
    for each, slots in ((gate, 1), (down, 8)):
        assert slots * each.k * BITS[TAKEN[0]] // 8 // each.segment % each.warps == 0


def test_what_no_tile_fits_is_left_to_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    taken = ExpertCase(3, 2, 256, 128)
    others = [replace(taken, ff=120), replace(taken, fmt="mxfp4"), replace(taken, fmt="block", hidden=384),
              replace(taken, act="swiglu_clamped", biased=True), replace(taken, biased=True),
              replace(taken, dtype=torch.float16)]  # fmt: skip
    for case in others:
        asked, given = case.choices(1, g), case.random(g)
        assert stream_experts(*asked, given) is None
    x, ids, shares = taken.choices(MOST_TOKENS + 1, g)
    given = taken.random(g)
    assert stream_experts(x, ids, shares, given) is None
    assert stream_experts(x[:1, 4:].new_zeros(1, 264)[:, 4:260], ids[:1], shares[:1], given) is None
    seen = []

    def answer(x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, given: Experts) -> torch.Tensor:
        seen.append(x)
        return x

    monkeypatch.setattr(registration, "run_experts", answer)
    assert registration.stream_or_run(x, ids, shares, given) is x
    assert len(seen) == 1
