"""Attention of decoding tokens in one kernel: it compiles for Hopper and Blackwell without spills, reads old keys
before it waits, and leaves to the Triton kernels what it does not suit. What it computes is checked on a GPU
(`python -m tokenspeed.bench.gpu.attention --check`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.cuda.nvrtc import compile_
from tests.kernels.triton.paged_step import PagedCase, check
from tests.kernels.triton.test_attention_registration import attention_of, program
from tests.seeds import SEED
from tokenspeed.kernels.cuda import registration
from tokenspeed.kernels.cuda.attend import (
    FAR,
    FAR_ROWS,
    MANY_ITEMS,
    MOST_TOKENS,
    Variant,
    attend,
    fits,
    reach_of,
    variant,
)
from tokenspeed.kernels.cuda.stream_tiles import SHARED
from tokenspeed.kernels.registry import Registry, Situation
from tokenspeed.kernels.triton import attention_tiles
from tokenspeed.kernels.triton.attention_registration import run_decode, run_prefill, run_rope_write
from tokenspeed.kernels.triton.paged import Heads
from tokenspeed.kernels.triton.view import Reach
from tokenspeed.ops.rope import Rope

BF16 = torch.bfloat16


def compiles(found: Variant, architecture: str) -> None:
    log, ptx = compile_("attend", found.defines(), architecture)
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    assert ptx.count("griddepcontrol.wait") == 1
    wait = ptx.index("griddepcontrol.wait")
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("cp.async.cg.shared.global") < wait
    assert wait < ptx.index("st.global") < len(ptx)
    assert ("st.shared::cluster" in ptx) == (found.splits > 0)
    assert ptx.count("mma.sync.aligned.m16n8k16.row.col.f32.bf16") >= 2 * found.dim // 16


@pytest.mark.parametrize(
    ("heads", "splits", "normed", "sinks"),
    [
        (Heads(32, 8, 128, 0.1, 0), 8, False, False),
        (Heads(32, 8, 64, 0.1, 0), 2, False, True),
        (Heads(64, 8, 128, 0.1, 0), 0, True, True),
        (Heads(20, 4, 128, 0.1, 0), 1, True, False),
    ],
)
def test_hopper_compiles_it(heads: Heads, splits: int, normed: bool, sinks: bool) -> None:
    compiles(variant(splits, heads, Rope(1e4, heads.head_dim), 16, normed, sinks), "sm_90a")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(("normed", "sinks"), [(False, False), (True, True)])
@pytest.mark.parametrize("group", [1, 5, 8])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("splits", "items"), [(0, 1), (1, 200), (1, MANY_ITEMS + 1), (4, 50)])
def test_every_variant_compiles(
    splits: int, items: int, dim: int, group: int, sinks: bool, normed: bool, architecture: str
) -> None:
    heads, rope = Heads(4 * group, 4, dim, 0.1, 0), Rope(1e4, dim // 2)
    compiles(variant(splits, heads, rope, 64, normed, sinks, items), architecture)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("splits", "items"), [(8, 16), (4, 64), (2, 128), (1, 129), (1, MANY_ITEMS + 1), (0, 8)])
def test_it_leaves_room_for_a_program_of_the_next_projection(splits: int, items: int, dim: int, group: int) -> None:
    found = variant(splits, Heads(8 * group, 8, dim, 0.1, 0), Rope(1e4, dim), 16, False, False, items)
    assert found.stages >= 2
    assert found.shared <= SHARED
    assert not found.splits or found.group * found.dim % found.splits == 0


def test_what_it_takes() -> None:
    assert fits(32, 8, 128)
    assert fits(64, 8, 64)
    assert not fits(72, 8, 128)
    assert not fits(4, 1, 256)
    assert not fits(32, 8, 96)
    assert not fits(16, 4, 256)
    registry, fused = Registry(), program(Heads(32, 8, 128, 0.1, 0), True)
    registration.register(registry)
    record = next(record for record in fused.records if record.op == "qk_norm_rope_attention")
    situation = Situation("cuda", "bfloat16", MOST_TOKENS, {})
    for usable in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registration, "usable", lambda usable=usable: usable)
            chosen = registry.choose(record.op, fused.operands(record), situation)
            assert (chosen is not None and chosen.name == "cuda.attend") == usable
            for other in (
                replace(situation, tokens=MOST_TOKENS + 1),
                replace(situation, dtype="float16"),
                replace(situation, device="cpu"),
                replace(situation, batch_invariant=True),
            ):
                assert registry.choose(record.op, fused.operands(record), other) is None


def test_soft_caps_of_scores_are_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "usable", lambda: True)
    situation, registry = Situation("cuda", "bfloat16", 4, {}), Registry()
    registration.register(registry)
    for cap in (0.0, 50.0):
        fused = program(Heads(32, 8, 128, 0.1, 0, cap), False)
        record = next(record for record in fused.records if record.op == "rope_attention")
        assert (registry.choose(record.op, fused.operands(record), situation) is None) == (cap > 0)


def test_pages_that_it_does_not_take() -> None:
    heads = Heads(8, 4, 64, 0.125, 0)
    for page, dtype in ((8, BF16), (16, torch.float8_e4m3fn)):
        case = PagedCase([(5, 1, 0)], heads, page, SEED, BF16, dtype)
        q, k, v = case.random(1, 16 * 64).to(BF16).split([512, 256, 256], dim=-1)
        assert attend(q, k, v, case.paged(), Rope(1e4, 64), heads) is None


def test_reach_by_lengths() -> None:
    near: tuple[list[int], ...] = ([], [0], [FAR], [100, 600, 900, 30], [8 * FAR] * (FAR_ROWS + 1), [5] * MOST_TOKENS)
    assert {reach_of(lengths) for lengths in near} == {Reach.NEAR}
    assert {reach_of([FAR + 1] * rows) for rows in range(1, FAR_ROWS + 1)} == {Reach.FAR}
    assert {reach_of(lengths) for lengths in ([100, 600, 2000, 30], [9 * FAR, 10, 10])} == {Reach.UNEVEN}


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("tokens", [3, 70])
def test_other_steps_go_the_triton_way(monkeypatch, seed, tokens):
    monkeypatch.setattr(attention_tiles, "MAX_SPLITS", 1)  # few programs for the interpreter
    heads = Heads(2, 1, 16, 0.25, 0)
    case = PagedCase([(5, tokens, 0)], heads, 16, seed)
    fused = program(heads, True)
    record = next(record for record in fused.records if record.op == "qk_norm_rope_attention")
    write, attention = attention_of(fused)
    given = list(case.random(tokens, 4 * 16).split([32, 16, 16], dim=-1))
    weights = [1 + 0.3 * case.random(16) for _ in range(2)]
    (found,) = registration.run_attend(case.step, record, given, weights)
    turned, _ = run_rope_write(case.step, write, given, weights)
    run = run_decode if tokens <= 64 else run_prefill
    (expected,) = run(case.step, attention, (turned,), [])
    assert found.abs().sum() > 0
    check(found, expected.double(), torch.float32)
