"""The chosen experts in the interpreter against float64: choice by choice, and in blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.bench.gpu.expert_cases import ExpertCase, exact, poisoned, worst_error
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.triton import experts as module
from tokenspeed.kernels.triton.expert_operands import ACTS
from tokenspeed.kernels.triton.expert_tiles import ProductTile, by_choice
from tokenspeed.kernels.triton.experts import experts_by_choice, experts_in_blocks, run_experts
from tokenspeed.kernels.triton.tiles import GemvTile

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SLOW = [pytest.mark.slow]
SMALL = ExpertCase(5, 3, 37, 21, dtype=FP32)
TILE = ProductTile(16, 32, 16, 4, 2, 0, True)


def check(case: ExpertCase, tokens: int, run: Any, padding: int = 0) -> None:
    print(f"seed {SEED}")
    g = torch.Generator().manual_seed(SEED)
    given, asked = case.random(g), case.choices(tokens, g, padding)
    with poisoned():
        got = run(*asked, given)
    assert (got.dtype, got.shape) == (case.dtype, asked[0].shape)
    assert worst_error(got, exact(*asked, given)) < case.tolerance


choice_by_choice = partial(experts_by_choice, first=GemvTile(16, 32, 2), second=GemvTile(16, 16, 1))
in_blocks = partial(experts_in_blocks, tile=TILE)


@pytest.mark.parametrize("run", [choice_by_choice, in_blocks])
@pytest.mark.parametrize("act, biased", [(act, act == "swiglu_clamped") for act in ACTS])
def test_activations(act: str, biased: bool, run: Any) -> None:
    check(replace(SMALL, act=act, biased=biased), 3, run)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype, fmt", [(FP32, "plain"), (BF16, "plain"), (FP16, "channel"), (BF16, "block")])
def test_products(dtype: torch.dtype, fmt: str, act: str, biased: bool, tokens: int) -> None:
    """By the tiles that a GPU takes."""
    case = ExpertCase(7, 3, 132, 45, act, biased, fmt, dtype)
    check(case, tokens, run_experts, padding=tokens > 2)


@pytest.mark.parametrize("run", [choice_by_choice, in_blocks])
@pytest.mark.parametrize("dtype, fmt", [(BF16, "plain"), pytest.param(FP16, "plain", marks=SLOW), (FP16, "channel")])
def test_formats(dtype: torch.dtype, fmt: str, run: Any) -> None:
    check(replace(SMALL, dtype=dtype, fmt=fmt, act="swiglu_clamped", biased=True), 2, run)


@pytest.mark.parametrize("tokens", [1, 5])
def test_blocks_of_scales(tokens: int) -> None:
    check(ExpertCase(4, 2, 144, 136, fmt="block", dtype=FP16), tokens, run_experts)


@pytest.mark.parametrize("run", [choice_by_choice, in_blocks])
def test_padding_gives_zeros(run: Any) -> None:
    check(SMALL, 4, run, padding=2)


def test_experts_of_more_than_a_block() -> None:
    check(ExpertCase(3, 2, 33, 17, biased=True, dtype=FP32), 41, in_blocks, padding=3)


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_usual_tiles(tokens: int) -> None:
    check(ExpertCase(9, 2, 48, 40, dtype=FP32), tokens, run_experts)


def test_many_tokens_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TOKENS", 5)
    check(SMALL, 13, partial(run_experts, tile=TILE), padding=4)


def test_rows_have_the_same_bits_beside_any_others() -> None:
    g = torch.Generator().manual_seed(SEED)
    given, (x, ids, shares) = SMALL.random(g), SMALL.choices(19, g)
    whole = run_experts(x, ids, shares, given, TILE)
    some = torch.randperm(19, generator=g)[:7]
    assert torch.equal(whole[some], run_experts(x[some], ids[some], shares[some], given, TILE))
    assert torch.equal(whole[:1], run_experts(x[:1], ids[:1], shares[:1], given, TILE))


def test_which_kernels_take_a_few_tokens() -> None:
    assert by_choice(1, 128, 8)
    assert by_choice(1, 4, 2)
    assert by_choice(2, 128, 8)
    assert not by_choice(2, 4, 2), "half of the experts would be read twice"
    assert not by_choice(8, 128, 8)
    assert not by_choice(1, 128, 8, scale_block=128)


def test_weights_that_do_not_fit_are_refused() -> None:
    g = torch.Generator().manual_seed(SEED)
    given, asked = SMALL.random(g), SMALL.choices(2, g)
    turned = given.down.transpose(1, 2).contiguous().transpose(1, 2)  # type: ignore[union-attr]
    for wrong in (replace(given, act="relu"), replace(given, down=turned), replace(given, gate_up=given.down)):
        with pytest.raises(UnsupportedError, match=r"supported: \[E, 2 F, H\] and \[E, H, F\] of one format"):
            run_experts(*asked, wrong)
