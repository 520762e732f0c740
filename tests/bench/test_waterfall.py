from __future__ import annotations

import random

import pytest

from tests.seeds import SEED
from tokenspeed.bench.gpu.waterfall import (
    Label,
    Launch,
    labels_between,
    middle_steps,
    role,
    waterfall,
)


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_advance_and_idle_add_up_to_the_span_however_kernels_overlap(seed: int) -> None:
    rng = random.Random(seed)
    starts = sorted(rng.uniform(0, 300) for _ in range(61))
    launches = [Launch(rng.choice("abc"), start, start + rng.expovariate(0.2)) for start in starts]
    before, rest = launches[0], launches[1:]
    found = waterfall(before, [rest[:20], rest[20:40], rest[40:]])
    assert found.span == pytest.approx(max(each.end for each in launches) - before.end)
    assert sum(line.advance + line.idle for line in found.lines) == pytest.approx(found.span)
    assert sum(line.count for line in found.lines) == 60
    assert sum(line.duration for line in found.lines) == pytest.approx(sum(each.end - each.start for each in rest))


def test_what_runs_under_another_advances_nothing() -> None:
    found = waterfall(Launch("z", 0, 10), [[Launch("a", 12, 20), Launch("b", 15, 19), Launch("c", 18, 23)]])
    lines = {line.kernel: (line.duration, line.advance, line.idle) for line in found.lines}
    assert lines == {"a": (8, 8, 2), "b": (4, 0, 0), "c": (5, 3, 0)}
    assert "span 13.0 us per step" in found.text()


def decode_step(at: float) -> list[Launch]:
    names = ["Memcpy HtoD", "_scatter", "gemv", "_decode", "gemv", "Memcpy DtoD", "_finish"]
    return [Launch(name, at + 10 * n, at + 10 * n + 8) for n, name in enumerate(names)]


LABELS = [Label(op, kernel) for op, kernel in
          (("prepare", "_scatter"), ("linear qkv", "gemv"), ("attention", "_decode"), ("linear o", "gemv"),
           ("sample", "_finish"))]  # fmt: skip


def test_equal_kernels_are_told_apart_by_their_place() -> None:
    found = waterfall(Launch("_finish", -5, -2), [decode_step(0), decode_step(70)], LABELS)
    assert not found.unlike
    assert {(line.op, line.kernel): line.count for line in found.lines if line.kernel == "gemv"} == {
        ("linear qkv", "gemv"): 2,
        ("linear o", "gemv"): 2,
    }
    assert found.samples()["linear o gemv"] == [1, 8, 8, 2]
    assert [line.op for line in found.lines if line.kernel.startswith("Memcpy")] == ["copy", "copy"]


def test_other_kernels_than_the_labels_are_not_given_ops() -> None:
    found = waterfall(Launch("_finish", -5, -2), [decode_step(0)[:4] + decode_step(0)[5:]], LABELS)
    assert found.unlike == "gemv: 1 for 2"
    assert {line.op for line in found.lines} == {"copy", ""}
    assert "(gemv: 1 for 2): no ops" in found.text()


def test_kernels_that_begin_at_once_may_come_in_any_order() -> None:
    one, other = decode_step(0), decode_step(70)
    other[2], other[3] = other[3]._replace(start=other[2].start), other[2]._replace(end=other[3].end)
    found = waterfall(Launch("_finish", -5, -2), [one, other], LABELS)
    assert {(line.op, line.count) for line in found.lines if line.op != "copy"} == {(each.op, 2) for each in LABELS}


def test_the_steps_are_those_in_the_middle() -> None:
    launches = [launch for n in range(9) for launch in decode_step(70 * n)]
    before, steps = middle_steps(launches, steps=4)
    assert before == Launch("_finish", 70 * 2 + 60, 70 * 2 + 68)
    assert [step[0].start for step in steps] == [70 * n for n in (3, 4, 5, 6)]
    assert all(step[-1].name == "_finish" and len(step) == 7 for step in steps)
    with pytest.raises(ValueError, match="a run of 9 steps, 10 are needed"):
        middle_steps(launches, steps=9)


def test_launches_belong_to_the_op_whose_mark_came_last() -> None:
    names = ["Memcpy HtoD", "_scatter", "mark", "norm", "gemv", "mark", "mark", "_decode", "mark", "_finish"]
    launches = [Launch(name, at, at + 1) for at, name in enumerate(names)]
    ops = ["prepare", "linear qkv", "split", "attention", "sample"]
    assert labels_between(launches, "mark", ops) == [
        ("prepare", "_scatter"),
        ("linear qkv", "norm"),
        ("linear qkv", "gemv"),
        ("attention", "_decode"),
        ("sample", "_finish"),
    ]
    with pytest.raises(ValueError, match="4 marks in the profile for 4 ops"):
        labels_between(launches, "mark", ops[:4])


@pytest.mark.parametrize(
    "weights, name",
    [
        ((), "op"),
        (("layers.11.attn_norm", "layers.11.qkv"), "op qkv"),
        (("layers.3.qkv", "layers.3.qkv_bias"), "op qkv"),
        (("final_norm", "lm_head"), "op lm_head"),
        (("layers.0.q_norm", "layers.0.k_norm"), "op"),
    ],
)
def test_a_role_is_the_op_and_its_matrix(weights: tuple[str, ...], name: str) -> None:
    assert role("op", weights) == name
