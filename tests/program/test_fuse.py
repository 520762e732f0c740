"""The peephole table: what it groups, what stops it, and that a grouped program is the same program."""

from __future__ import annotations

from typing import Any

import pytest

from tests.program.random_programs import random_step, random_weights, run
from tokenspeed.models.dense import SANDWICH_NORMS, DenseConfig
from tokenspeed.models.dense_weights import dense_weights
from tokenspeed.models.gemma3 import wire as gemma3_wire
from tokenspeed.models.llama import wire as llama_wire
from tokenspeed.ops.rope import Rope
from tokenspeed.program.fuse import fuse
from tokenspeed.program.program import Program
from tokenspeed.program.recorder import Recorder, Value, record

ROPE = Rope(10000.0, 8)
CONFIG = DenseConfig(
    vocab_size=37,
    hidden_size=24,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    ff_size=40,
    norm_eps=1e-6,
    context=64,
    ropes=(ROPE, ROPE),
    windows=(0, 3),
    attention_scale=0.3,
    tied=False,
)


def shapes_of(config: DenseConfig) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in dense_weights(config).specs.items()}


def build(family: str, adapters: dict[str, int] | None = None, capture: tuple[str, ...] = ()) -> Program:
    variants: dict[str, tuple[dict[str, Any], Any]] = {
        "llama": ({}, llama_wire),
        "qwen3": ({"qk_norm": True}, llama_wire),
        "qwen2": ({"qkv_bias": True}, llama_wire),
        "gemma3": ({"qk_norm": True, "norms": SANDWICH_NORMS, "act": "gelu_tanh", "tied": True}, gemma3_wire),
    }
    variant, wire = variants[family]
    config = DenseConfig(**{**CONFIG.__dict__, **variant})
    return record(lambda g: wire(g, config), shapes_of(config), adapters, capture)


def ops(program: Program) -> list[str]:
    return [record.op for record in program.records]


def assert_same_function(plain: Program, fused: Program, seed: int = 0) -> None:
    weights = random_weights(plain, seed)
    step = random_step(seed, layers=CONFIG.num_layers, kv_heads=CONFIG.num_kv_heads, head_dim=CONFIG.head_dim)
    expected, got = run(plain, weights, step()), run(fused, weights, step())
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert value.abs().sum() > 0
        assert (value == got[name]).all(), name


def test_llama_layers_become_the_usual_shapes() -> None:
    assert ops(fuse(build("llama"))) == [
        "embed",
        "norm_linear",
        "split",
        "rope_attention",
        "linear",
        "join_norm_linear_act",
        "linear",
        "join_norm_linear",
        "split",
        "rope_attention",
        "linear",
        "join_norm_linear_act",
        "linear",
        "add",
        "select",
        "norm_linear",
    ]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", {"qk_norm_rope_attention": 2, "join_norm_linear_act": 2, "join_norm_linear": 1}),
        ("qwen2", {"rope_attention": 2, "join_norm_linear_act": 2, "join_norm_linear": 1}),
        ("gemma3", {"qk_norm_rope_attention": 2, "branch_join_norm_linear_act": 2, "branch_join_norm_linear": 1}),
    ],
)
def test_families_vary_the_match_without_saying_so(family: str, expected: dict[str, int]) -> None:
    found = ops(fuse(build(family)))
    assert {op: found.count(op) for op in expected} == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_fused_program_computes_the_same(family: str) -> None:
    plain = build(family)
    assert_same_function(plain, fuse(plain))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_plain_record_stays_once_and_in_a_valid_order(family: str) -> None:
    plain = build(family)
    fused = fuse(plain)
    flat = [part for record in fused.records for part in record.plain()]
    assert sorted(map(id, flat)) == sorted(map(id, plain.records))
    known = {plain.inputs["tokens"]}
    for item in flat:
        assert set(item.inputs) <= known
        known |= set(item.outputs)


def test_an_adapter_keeps_the_norm_out_of_its_projection_and_changes_nothing_else() -> None:
    plain = build("llama", adapters={"layers.1.qkv": 3})
    found = ops(fuse(plain))
    without = ops(fuse(build("llama")))
    # The norm of layer 1 now feeds two projections, so it is joined to the residual add but not to either of them.
    assert found.count("join_norm_linear") == without.count("join_norm_linear") - 1
    assert found.count("join_norm") == 1
    assert found.count("join_norm_linear_act") == without.count("join_norm_linear_act")
    assert_same_function(plain, fuse(plain))


def test_an_adapter_on_gate_up_keeps_the_activation_out_too() -> None:
    plain = build("llama", adapters={"layers.0.gate_up": 3})
    found = ops(fuse(plain))
    assert found.count("join_norm_linear_act") == 1
    assert found.count("act_mul") == 1
    assert_same_function(plain, fuse(plain))


def test_a_captured_residual_costs_no_fusion() -> None:
    """The residual stream leaves the fused op anyway."""
    plain = build("llama", capture=("layers.1.attn_norm",))
    assert ops(fuse(plain)) == ops(fuse(build("llama")))
    assert "hidden.layers.1.attn_norm" in plain.outputs
    assert_same_function(plain, fuse(plain))


def test_a_router_takes_its_norm_whose_row_the_experts_still_see() -> None:
    shapes: dict[str, tuple[int, ...]] = {"table": (37, 32), "norm": (32,), "router": (4, 32), "up": (4, 16, 32)}
    g = Recorder(shapes | {"down": (4, 32, 8), "branch": (32, 32), "head": (37, 32)})
    x = g.embed(g.tokens, "table")
    normed = g.norm(g.add(x, g.linear(x, "branch")), "norm", eps=1e-6)
    chosen = g.route(g.linear(normed, "router"), k=2, score="softmax")
    plain = g.program(logits=g.linear(g.experts(normed, chosen, "up", "down", act="silu"), "head"))
    fused = fuse(plain)
    assert ops(fused) == ["embed", "linear", "join_norm_route", "experts", "linear"]
    assert fused.records[2].attrs["k"] == 2
    assert len(fused.records[2].outputs) == 3  # the row, ids and weights; nobody reads the sum
    assert_same_function(plain, fused)


def test_a_captured_norm_stops_the_match() -> None:
    plain = build("llama", capture=("layers.1.qkv",))
    found = ops(fuse(plain))
    assert found.count("join_norm") == 1
    assert found.count("join_norm_linear") == 0
    assert_same_function(plain, fuse(plain))


def test_a_captured_branch_stops_the_branch_norm() -> None:
    """Gemma's branch norm output, read by nobody else, is inside the group; captured, it stays outside."""
    shapes = {"n1": (8,), "n2": (8,), "w": (5, 8), "embed": (37, 8)}

    def wire(g: Recorder, read_branch: bool) -> tuple[Value, Value]:
        x = g.embed(g.tokens, "embed")
        branch = g.norm(x, "n1", eps=1e-6)
        y = g.linear(g.norm(g.add(x, branch), "n2", eps=1e-6), "w")
        return y, branch if read_branch else y

    found = []
    for read_branch in (False, True):
        g = Recorder(shapes)
        y, extra = wire(g, read_branch)
        found.append(ops(fuse(g.program(logits=y, extra=extra))))
    assert found == [["embed", "branch_join_norm_linear"], ["embed", "norm", "join_norm_linear"]]


def test_a_reader_between_the_parts_of_a_group_stops_it() -> None:
    """x is read by a record that stands between the add and the norm: grouping would move the add behind its reader."""
    shapes = {"n": (8,), "w": (5, 8), "u": (8, 8), "embed": (37, 8)}
    g = Recorder(shapes)
    a = g.embed(g.tokens, "embed")
    x = g.add(a, a)
    other = g.linear(x, "u")
    y = g.linear(g.norm(x, "n", eps=1e-6), "w")
    program = fuse(g.program(logits=y, other=other))
    assert ops(program) == ["embed", "add", "linear", "norm_linear"]


def test_attention_with_its_rotation_has_its_own_attributes() -> None:
    found = [each for each in fuse(build("qwen3")).records if each.op == "qk_norm_rope_attention"]
    for group in found:
        write, attention = group.parts
        assert [write.op, attention.op] == ["qk_norm_rope_write", "attention"]
        assert group.attrs == attention.attrs
        assert len(group.inputs) == 3
        assert group.outputs == attention.outputs
    assert len(found) == 2


def test_a_second_reader_of_the_turned_queries_keeps_attention_apart() -> None:
    g = Recorder({"embed": (37, 24)})
    q, k, v = g.split(g.embed(g.tokens, "embed"), 8, 8, 8)
    q, k = g.rope(q, k, ROPE, head_dim=8)
    out = g.attention(q, k, v, 0, head_dim=8, scale=1.0, window=0)
    assert ops(fuse(g.program(out=out)))[-1] == "rope_attention"
    assert ops(fuse(g.program(out=out, queries=q)))[-2:] == ["rope_write", "attention"]


def test_group_borders_are_what_others_read() -> None:
    plain = build("llama")
    fused = fuse(plain)
    group = next(record for record in fused.records if record.op == "join_norm_linear_act")
    add = next(part for part in group.plain() if part.op == "add")
    act = next(part for part in group.plain() if part.op == "act_mul")
    assert set(group.outputs) == {add.outputs[0], act.outputs[0]}
    assert set(group.inputs) == set(add.inputs)
    assert group.weights == ("layers.0.mlp_norm", "layers.0.gate_up")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.9\.qkv"):
        build("llama", adapters={"layers.9.qkv": 2})
    with pytest.raises(ValueError, match="nothing"):
        build("llama", capture=("nothing",))
    scope = Recorder({"a.b": (1,)}).weights("a.")
    assert scope.b == "a.b"
    with pytest.raises(AttributeError, match="there are: b"):
        _ = scope.c
