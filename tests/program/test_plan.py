"""The plan pass: lowering by what a registry offers, lifetimes, buffers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.program.test_fuse import build
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels import ref
from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.program.fuse import fuse
from tokenspeed.program.plan import BUCKETS, Plan, bucket_of, plan
from tokenspeed.program.program import Program

PLAIN_OPS = ("embed", "norm", "linear", "split", "rope", "kv_write", "attention", "add", "act_mul", "select")


def situation(tokens: int = 4) -> Situation:
    return Situation("cpu", "float32", tokens, {})


def registry(*fused: str, most_tokens: int = 16) -> Registry:
    made = Registry()
    for op in PLAIN_OPS:
        made.add(Implementation("plain", op, "test", print, lambda operands, where: True, 0))
    for op in fused:
        made.add(Implementation("fast", op, "test", print, lambda operands, where: where.tokens <= most_tokens, 10))
    return made


def names(made: Plan) -> list[tuple[str, str]]:
    return [(step.record.op, step.implementation.name) for step in made.steps]


def test_without_fused_kernels_the_plain_program_comes_back() -> None:
    plain = build("gemma3")
    made = plan(fuse(plain), registry(), situation())
    assert sorted(id(step.record) for step in made.steps) == sorted(map(id, plain.records))


def test_a_group_falls_back_to_the_largest_group_inside_it() -> None:
    """join_norm_linear_act without a kernel of its own runs as join_norm_linear and act_mul."""
    made = plan(fuse(build("llama")), registry("join_norm_linear"), situation())
    assert names(made)[8:10] == [("join_norm_linear", "fast"), ("act_mul", "plain")]
    made = plan(fuse(build("llama")), registry("join_norm", "join_norm_linear_act"), situation())
    assert ("join_norm_linear_act", "fast") in names(made)
    assert ("join_norm", "fast") in names(made)  # of layer 1's qkv, whose own group has no kernel


def test_fusion_differs_by_bucket() -> None:
    fused, offered = fuse(build("llama")), registry("join_norm", "join_norm_linear_act", most_tokens=16)
    assert ("join_norm_linear_act", "fast") in names(plan(fused, offered, situation(16)))
    large = names(plan(fused, offered, situation(512)))
    assert ("join_norm_linear_act", "fast") not in large
    assert large.count(("linear", "plain")) == 9


def test_priority_decides_and_names_are_unique() -> None:
    made = registry("embed")
    assert names(plan(fuse(build("llama")), made, situation()))[0] == ("embed", "fast")
    with pytest.raises(ValueError, match="twice"):
        made.add(Implementation("fast", "embed", "test", print, lambda operands, where: True, 1))


def test_an_op_without_implementation_is_named() -> None:
    made = Registry()
    made.add(Implementation("plain", "embed", "test", print, lambda operands, where: True, 0))
    with pytest.raises(UnsupportedError, match="norm has no implementation on cpu"):
        plan(build("llama"), made, situation())


def test_the_reference_takes_every_plain_op() -> None:
    made = Registry()
    ref.register(made)
    assert {step.implementation.name for step in plan(fuse(build("gemma3")), made, situation()).steps} == {"ref"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("fused", [False, True])
def test_values_die_after_their_last_reader_and_outputs_never(family: str, fused: bool) -> None:
    program = fuse(build(family, capture=("layers.1.attn_norm",)))
    groups = {r.op for r in program.records if r.parts} if fused else ()
    made = plan(program, registry(*groups), situation())
    alive = {program.inputs["tokens"]}
    for step in made.steps:
        assert set(step.record.inputs) <= alive
        alive |= set(step.record.outputs)
        alive -= set(step.frees)
    assert alive == set(program.outputs.values())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("tokens", [1, 8, 512])
def test_values_alive_together_have_different_buffers(family: str, tokens: int) -> None:
    program = fuse(build(family, capture=("layers.0.mlp_norm",)))
    made = plan(program, registry(), situation(tokens))
    check_buffers(program, made, tokens)
    # Reuse is the point: far fewer buffers than values.
    assert len(made.buffer_elements) <= 9


def check_buffers(program: Program, made: Plan, tokens: int) -> None:
    owner: dict[int, int] = {}
    alive: dict[int, int] = {}
    for step in made.steps:
        for value in step.record.outputs:
            if step.record.op == "split":
                owner[value] = owner.get(step.record.inputs[0], step.record.inputs[0])
                assert made.buffers[value] == made.buffers[owner[value]]
            elif program.shapes[value]:
                buffer = made.buffers[value]
                assert buffer not in alive.values(), f"{step.record.op} overwrites a value that is still read"
                assert made.buffer_elements[buffer] >= elements(program, value, tokens)
                alive[value] = buffer
        for value in step.frees:
            base = owner.get(value, value)
            views = [v for v, o in owner.items() if o == base]
            later = {v for s in made.steps[made.steps.index(step) + 1 :] for v in s.record.inputs}
            if not later & {base, *views} and base not in program.outputs.values():
                alive.pop(base, None)


def elements(program: Program, value: int, tokens: int) -> int:
    total = 1
    for dim in program.shapes[value]:
        total *= tokens if isinstance(dim, str) else dim
    return total


@pytest.mark.parametrize(
    "count, expected",
    [
        (1, 1),
        (2, 2),
        (3, 4),
        (16, 16),
        (17, 32),
        (520, 768),
        (8192, 8192),
        (9000, 12288),
        (16385, 16640),
        (20000, 20224),
    ],
)
def test_buckets(count: int, expected: int) -> None:
    assert bucket_of(count) == expected
    assert list(BUCKETS) == sorted(BUCKETS)


def test_a_predicate_sees_operands_and_situation() -> None:
    seen: list[Any] = []
    made = registry()

    def takes(operands: Any, where: Situation) -> bool:
        seen.append((operands.weight_shapes, where.tokens))
        return False

    made.add(Implementation("picky", "norm_linear", "test", print, takes, 5))
    plan(fuse(build("llama")), made, situation(2))
    assert ((24,), (80, 24)) in [shapes for shapes, _ in seen]
    assert {tokens for _, tokens in seen} == {2}
