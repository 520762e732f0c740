"""The torch references against float64 arithmetic written another way."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from tests.program.random_programs import random_step
from tokenspeed.ops.definitions import KvScale
from tokenspeed.ops.reference import REFERENCE, StepView
from tokenspeed.ops.rope import Rope, llama3_rope

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 6, 2, 8, 2


def call(op: str, view: StepView, *inputs: torch.Tensor, weights: tuple[torch.Tensor, ...] = (), **attrs: Any) -> Any:
    outputs = REFERENCE[op](view, inputs, weights, attrs)
    return outputs[0] if len(outputs) == 1 else outputs


def step(seed: int = 0) -> StepView:
    return random_step(seed, layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)()


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 7), (5, 640), (2, 2049)])
def test_norm(dtype: torch.dtype, rows: int, cols: int) -> None:
    x, w = torch.randn(rows, cols).to(dtype), torch.randn(cols)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w.double()
    assert error(call("norm", step(), x, weights=(w,), eps=1e-6, per_head=0), expected) < TOLERANCE[dtype]


def test_norm_per_head_is_a_norm_of_each_head() -> None:
    x, w = torch.randn(3, 4 * 5), torch.randn(5)
    got = call("norm", step(), x, weights=(w,), eps=1e-5, per_head=5)
    heads = [call("norm", step(), x[:, i : i + 5], weights=(w,), eps=1e-5, per_head=0) for i in range(0, 20, 5)]
    torch.testing.assert_close(got, torch.cat(heads, -1))


def test_norm_uses_its_epsilon() -> None:
    x = torch.full((1, 4), 1e-4)
    got = call("norm", step(), x, weights=(torch.ones(4),), eps=1e-2, per_head=0)
    torch.testing.assert_close(got, x / math.sqrt(1e-8 + 1e-2))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_with_and_without_bias(dtype: torch.dtype) -> None:
    x, w, b = torch.randn(3, 65).to(dtype), torch.randn(33, 65).to(dtype), torch.randn(33)
    plain = x.double() @ w.double().T
    assert error(call("linear", step(), x, weights=(w,)), plain) < TOLERANCE[dtype]
    assert error(call("linear", step(), x, weights=(w, b)), plain + b.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_act_mul(act: str) -> None:
    x = torch.randn(3, 22)
    gate, up = x.double()[:, :11], x.double()[:, 11:]
    if act == "silu":
        expected = gate / (1 + (-gate).exp()) * up
    else:
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        expected = 0.5 * gate * (1 + inner.tanh()) * up
    assert error(call("act_mul", step(), x, act=act), expected) < 1e-6


def test_embed_scales_in_the_compute_dtype() -> None:
    table = torch.randn(11, 4).bfloat16()
    got = call("embed", step(), torch.tensor([3, 0, 3]), weights=(table,), scale=640**0.5)
    expected = table[[3, 0, 3]] * torch.tensor(25.25, dtype=torch.bfloat16)
    assert (got == expected).all()


@pytest.mark.parametrize("divisors", [(), (1.0, 2.0, 4.0, 8.0)])
@pytest.mark.parametrize("dim", [8, 4])
def test_rope_turns_each_pair_by_its_angle(divisors: tuple[float, ...], dim: int) -> None:
    """The reference pairs (i, i + dim/2); a complex rotation of those pairs must agree, the rest must stay."""
    rope = Rope(100.0, dim, divisors[: dim // 2])
    view = step()
    q, k = torch.randn(9, HEADS * HEAD_DIM), torch.randn(9, KV_HEADS * HEAD_DIM)
    got_q, got_k = call("rope", view, q, k, rope=rope, head_dim=HEAD_DIM)
    for got, x in ((got_q, q), (got_k, k)):
        heads = x.double().reshape(9, -1, HEAD_DIM)
        index = torch.arange(dim // 2, dtype=torch.float64)
        frequency = 100.0 ** (-2 * index / dim) / torch.tensor(rope.divisors or [1.0] * (dim // 2))
        turn = torch.polar(torch.ones(()).double(), view.positions[:, None].double() * frequency)[:, None]
        turned = torch.complex(heads[..., : dim // 2], heads[..., dim // 2 : dim]) * turn
        expected = torch.cat((turned.real, turned.imag, heads[..., dim:]), -1).reshape(9, -1)
        assert error(got, expected) < 1e-5


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_fp8_pages_with_scales(softcap: float) -> None:
    """What is stored times its scale is what was given, within e4m3's step; attention multiplies by it."""
    given = step()
    view = dataclasses.replace(given, kv=torch.full(given.kv.shape, -448.0).to(torch.float8_e4m3fn))
    scale, tokens = KvScale(7.3, 0.02), 9
    sizes: dict[str, Any] = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "layer": 1}
    q, k, v = (torch.randn(tokens, heads * HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    call("kv_write", view, 300 * scale.key * k, 300 * scale.value * v, **sizes, kv_scale=scale)
    for i, slot in enumerate(view.slots[0].tolist()):
        for which, x in enumerate((k, v)):
            wanted = (300 * x[i].double()).clamp(-448, 448)
            torch.testing.assert_close(
                view.kv[slot // 4, 1, which, slot % 4].double().flatten(), wanted, rtol=0.0626, atol=2e-3
            )
    attrs: dict[str, Any] = sizes | {"heads": HEADS, "window": 0, "softcap": softcap}
    stored = view.kv[:, 1]
    got = call("attention", view, q, stored, **attrs, scale=1e-4, kv_scale=scale)
    wide = stored.double() * torch.tensor(scale).double().view(1, 2, 1, 1, 1)
    expected = call("attention", view, q.double(), wide, **attrs, scale=1e-4)
    assert error(got, expected) < 1e-5


def test_kv_write_puts_each_token_where_its_slot_says_and_touches_nothing_else() -> None:
    view = step()
    before = view.kv.clone()
    k, v = torch.randn(9, KV_HEADS * HEAD_DIM), torch.randn(9, KV_HEADS * HEAD_DIM)
    call("kv_write", view, k, v, layer=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    written = torch.zeros(view.kv.shape[:4], dtype=torch.bool)
    for i, slot in enumerate(view.slots[0].tolist()):
        assert (view.kv[slot // 4, 1, 0, slot % 4].flatten() == k[i]).all()
        assert (view.kv[slot // 4, 1, 1, slot % 4].flatten() == v[i]).all()
        written[slot // 4, 1, :, slot % 4] = True
    assert (view.kv[~written] == before[~written]).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [0, 1, 2, 5, 100])
@pytest.mark.parametrize("layer", [0, 1])
def test_attention_over_scattered_pages(dtype: torch.dtype, window: int, layer: int) -> None:
    view = step(seed=window)
    view.kv = view.kv.to(dtype)
    q = torch.randn(9, HEADS * HEAD_DIM).to(dtype)
    attrs: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "scale": 0.4}
    attrs |= {"window": window, "softcap": 0.0}
    got = call("attention", view, q, view.kv[:, layer], layer=layer, **attrs)
    assert error(got, naive_attention(view, q, layer, window)) < TOLERANCE[dtype]
    sinks = 2 * torch.randn(HEADS)
    got = call("attention", view, q, view.kv[:, layer], weights=(sinks,), layer=layer, **attrs)
    assert error(got, naive_attention(view, q, layer, window, sinks)) < TOLERANCE[dtype]


def naive_attention(
    view: StepView, q: torch.Tensor, layer: int, window: int, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """One query, one head, one key at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i, (table,) in enumerate(view.block_tables):
        for t in range(view.query_start[i], view.query_start[i + 1]):
            position = int(view.positions[t])
            for head in range(HEADS):
                query = q[t, head * HEAD_DIM : (head + 1) * HEAD_DIM].double()
                seen = range(max(0, position - window + 1) if window else 0, position + 1)
                entries = [view.kv[int(table[p // 4]), layer, :, p % 4, head // (HEADS // KV_HEADS)] for p in seen]
                scores = torch.stack([query @ entry[0].double() for entry in entries]) * 0.4
                values = torch.stack([entry[1].double() for entry in entries])
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].double()))
                weights = scores.softmax(0)[: len(entries)]
                out[t, head * HEAD_DIM : (head + 1) * HEAD_DIM] = weights @ values
    return out


def test_select_and_split_and_add() -> None:
    view, x = step(), torch.randn(9, 6)
    assert (call("select", view, x) == x[[2, 3, 8]]).all()
    a, b = call("split", view, x, sizes=(2, 4))
    assert (a == x[:, :2]).all()
    assert (b == x[:, 2:]).all()
    assert (call("add", view, x, x) == 2 * x).all()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_equals_transformers(factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, head_dim=128, rope_parameters=scaling)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    rope = llama3_rope(500000.0, 128, scaling)
    got = 500000.0 ** -(torch.arange(0, 128, 2) / 128) / torch.tensor(rope.divisors)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=0)
