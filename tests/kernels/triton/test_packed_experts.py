"""The chosen experts by MXFP4 weights in the interpreter against float64: choice by choice, and in blocks."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import and_
from typing import Any

import pytest
import torch

from tests.kernels.triton.test_expert_kernels import BF16, FP16, FP32, check
from tests.seeds import SEED
from tokenspeed.bench.gpu.expert_cases import ExpertCase
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.triton import packed_experts as module
from tokenspeed.kernels.triton.expert_operands import ACTS
from tokenspeed.kernels.triton.expert_tiles import (
    ProductTile,
    choice_splits,
    choice_tile,
    packed_product_tile,
    packed_tile_of,
)
from tokenspeed.kernels.triton.experts import run_experts
from tokenspeed.kernels.triton.mxfp4_codes import WIDEN
from tokenspeed.kernels.triton.packed_experts import packed_by_choice, packed_in_blocks
from tokenspeed.quantization.mxfp4 import VALUES
from tokenspeed.quantization.mxfp4_experts import pack_words

SMALL = ExpertCase(5, 3, 160, 96, fmt="mxfp4", dtype=FP32)
"""Neither width is a whole number of runs."""
TILE = ProductTile(16, 64, 128, 4, 2, 0, True)
by_choice = partial(packed_by_choice, first=TILE, second=TILE)
in_blocks = partial(packed_in_blocks, tile=TILE)


@pytest.mark.parametrize("run", [by_choice, in_blocks])
@pytest.mark.parametrize("act, biased", [("silu", False), ("swiglu_clamped", True)])
def test_activations(act: str, biased: bool, run: Any) -> None:
    check(replace(SMALL, act=act, biased=biased), 2, run)


@pytest.mark.parametrize("splits", [(2, 3), pytest.param((4, 1), marks=pytest.mark.slow)])
def test_columns_in_parts(splits: tuple[int, int]) -> None:
    """Of which the last may be short, or empty."""
    case = replace(SMALL, hidden=416, ff=224, act="swiglu_clamped", biased=True)
    check(case, 3, partial(by_choice, splits=splits), padding=1)


@pytest.mark.parametrize("run", [by_choice, in_blocks])
def test_bfloat16_with_padding(run: Any) -> None:
    check(replace(SMALL, dtype=BF16, act="swiglu_clamped", biased=True), 4, run, padding=2)


@pytest.mark.parametrize("tokens", [1, 7])
def test_the_usual_tiles(tokens: int) -> None:
    """Rows that no tile divides."""
    check(ExpertCase(7, 2, 96, 64, "swiglu_clamped", True, "mxfp4", FP32), tokens, run_experts)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 17, 70])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_products(dtype: torch.dtype, act: str, biased: bool, tokens: int) -> None:
    """By the tiles that a GPU takes."""
    check(ExpertCase(7, 3, 224, 96, act, biased, "mxfp4", dtype), tokens, run_experts, padding=tokens > 2)


def test_more_choices_than_a_block_holds_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenspeed.kernels.triton.experts.MOST_TOKENS", 40)
    check(ExpertCase(3, 2, 64, 32, "swiglu_clamped", True, "mxfp4", FP32), 45, partial(run_experts, tile=TILE), 3)


def test_rows_have_the_same_bits_beside_any_others() -> None:
    g = torch.Generator().manual_seed(SEED)
    case = replace(SMALL, dtype=BF16)
    given, (x, ids, shares) = case.random(g), case.choices(19, g)
    whole = run_experts(x, ids, shares, given, TILE)
    some = torch.randperm(19, generator=g)[:7]
    assert torch.equal(whole[some], run_experts(x[some], ids[some], shares[some], given, TILE))
    assert torch.equal(whole[:1], run_experts(x[:1], ids[:1], shares[:1], given, TILE))


def test_who_ends_last_leaves_zeros_behind() -> None:
    """The counters that programs of a choice share are what they were, so a second launch gives the same."""
    g = torch.Generator().manual_seed(SEED)
    given, asked = SMALL.random(g), SMALL.choices(3, g, padding=1)
    first = by_choice(*asked, given)
    counters = module._counters(torch.device("cpu"), module.packed_parts(given)[1].q.data_ptr(), 4 * 3 * 3)
    assert (counters == 0).all()
    assert torch.equal(first, by_choice(*asked, given))


def test_few_programs_share_the_columns() -> None:
    assert [choice_splits(programs, 2880) for programs in (90, 360, 720, 1440)] == [4, 4, 2, 1]
    assert choice_splits(90, 512) == 1
    assert [choice_tile(choices, rows).block_n for choices, rows in ((4, 5760), (4, 2880), (8, 2880))] == [64, 32, 64]


def test_blocks_follow_the_expected_part_of_an_expert() -> None:
    assert [packed_product_tile(tokens, 32, 4).rows for tokens in (3, 32, 64, 128, 512, 4096)] == [
        8,
        8,
        16,
        32,
        64,
        128,
    ]
    assert packed_tile_of(64).rows == 64


def test_weights_that_do_not_fit_are_refused() -> None:
    g = torch.Generator().manual_seed(SEED)
    given, plain = SMALL.random(g), replace(SMALL, fmt="plain").random(g)
    asked = SMALL.choices(2, g)
    for wrong in (replace(given, act="relu"), replace(given, down=plain.down), replace(given, gate_up=given.down)):
        with pytest.raises(UnsupportedError, match=r"mxfp4 .*supported: \[E, 2 F, H\] and \[E, H, F\] of one format"):
            run_experts(*asked, wrong)


def test_widening_by_instructions() -> None:
    """What the assembly for Hopper does to the halves of a word, step by step."""
    codes = torch.randint(0, 16, (1, 128), generator=torch.Generator().manual_seed(SEED)).to(torch.uint8)
    factors = [120, 131, 90, 155]
    words = (pack_words(codes)[0].int() & 0xFFFF).tolist()
    for low in range(0, 32, 2):
        register = words[low] | words[low + 1] << 16
        found = assembled(register, [(exponent << 7) * 0x10001 for exponent in factors])
        for block, pair in enumerate(found):
            for half, word in zip(pair, (low, low + 1), strict=True):
                code = int(codes[0, 32 * block + word])
                value = VALUES[code & 7] * (-1.0 if code > 7 else 1.0) * 2.0 ** (factors[block] - 127)
                assert half == value * 2.0**-126


def turned(word: int, again: int, left: int) -> int:
    assert word == again
    return word << left | word >> 32 - left


PLAIN: dict[str, Callable[..., int]] = {"and.b32": and_, "shf.l.wrap.b32": turned}


def assembled(word: int, factors: list[int]) -> list[tuple[float, float]]:
    """Values of both halves of $0 to $3."""
    held = {"$4": word, **{f"${5 + i}": factor for i, factor in enumerate(factors)}}
    made: dict[str, tuple[float, float]] = {}
    for line in WIDEN.value.split(";"):
        name, *operands = re.findall(r"[\w.$]+", line) or [""]
        if name not in (*PLAIN, "lop3.b32", "mul.rn.bf16x2"):
            assert name in ("", ".reg"), name
            continue
        values = [held[each] if each in held else int(each, 0) for each in operands[1:]]
        if name == "mul.rn.bf16x2":
            made[operands[0]] = tuple(map(float.__mul__, halves(values[0]), halves(values[1])))  # type: ignore[assignment]
            continue
        if name == "lop3.b32":
            assert values[3] == 0xEA, "(a and b) or c"
            held[operands[0]] = values[0] & values[1] | values[2]
            continue
        held[operands[0]] = PLAIN[name](*values) & 0xFFFFFFFF
    return [made[f"${i}"] for i in range(4)]


def halves(register: int) -> tuple[float, float]:
    """Both bfloat16 values of a register, as float64 has them exactly."""
    low, high = struct.unpack("<2f", struct.pack("<2I", register << 16 & 0xFFFFFFFF, register & 0xFFFF0000))
    return low, high
