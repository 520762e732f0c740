"""What lies between two attentions as one record: found in a model, and run either way to the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.kernels.cuda import registration
from tokenspeed.kernels.cuda.chain import Link
from tokenspeed.program.fuse import fuse
from tokenspeed.program.program import Program
from tokenspeed.program.recorder import Recorder

HIDDEN, FF, NEXT = 32, 48, 40
SHAPES = {"table": (9, HIDDEN), "o": (HIDDEN, HIDDEN), "n1": (HIDDEN,), "gate_up": (2 * FF, HIDDEN),
          "down": (HIDDEN, FF), "n2": (HIDDEN,), "qkv": (NEXT, HIDDEN), "b1": (HIDDEN,), "b2": (HIDDEN,)}  # fmt: skip


def between(branch_norms: bool) -> Program:
    g = Recorder(SHAPES)
    x = g.embed(g.tokens, "table")
    out = g.linear(g.add(x, x), "o")
    x = g.add(x, g.norm(out, "b1", eps=1e-3) if branch_norms else out)
    hidden = g.act_mul(g.linear(g.norm(x, "n1", eps=1e-5), "gate_up"), "silu")
    down = g.linear(hidden, "down")
    x = g.add(x, g.norm(down, "b2", eps=1e-4) if branch_norms else down)
    return fuse(g.program(qkv=g.linear(g.norm(x, "n2", eps=1e-6), "qkv"), residual=x))


def product(x: torch.Tensor, weight: Any, act: str) -> torch.Tensor:
    y = x @ weight.T
    if act == "none":
        return y
    gate, up = y.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight


def one_by_one(x: torch.Tensor, weight: Any, bias: Any, act: str, prologue: Any) -> Any:
    joined = None
    if prologue is not None:
        branch = prologue.branch
        joined = x + (normed(branch, prologue.branch_norm) if prologue.branch_norm else branch)
        x = normed(joined, prologue.norm)
    return product(x, weight, act), joined


def chained(x: torch.Tensor, residual: torch.Tensor, links: list[Link]) -> tuple[torch.Tensor, torch.Tensor]:
    for link in links:
        if link.norm is not None:
            residual = residual + (normed(x, link.branch_norm) if link.branch_norm else x)
            x = normed(residual, link.norm)
        x = product(x, link.weight, link.act)
    return x, residual


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("branch_norms", [False, True])
def test_one_kernel_gets_what_each_gets(monkeypatch: pytest.MonkeyPatch, branch_norms: bool, seed: int) -> None:
    program = between(branch_norms)
    record = next(each for each in program.records if each.op == "layer_chain")
    assert [part.op.removeprefix("branch_") for part in record.parts] == [
        "linear", "join_norm_linear_act", "linear", "join_norm_linear",
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(1, HIDDEN, generator=generator, dtype=torch.float64) for _ in record.inputs]
    weights = [torch.randn(SHAPES[name], generator=generator, dtype=torch.float64) for name in record.weights]
    monkeypatch.setattr(registration, "stream_or_project", one_by_one)
    monkeypatch.setattr(registration, "chain", lambda *given: None)
    expected = registration.run_layer_chain(None, record, values, weights)
    monkeypatch.setattr(registration, "chain", chained)
    found = registration.run_layer_chain(None, record, values, weights)
    assert len(found) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert {len(each[0]) for each in found} == {HIDDEN, NEXT}


def test_a_captured_value_between_keeps_them_apart() -> None:
    g = Recorder(SHAPES)
    x = g.embed(g.tokens, "table")
    x = g.add(x, g.linear(x, "o"))
    hidden = g.act_mul(g.linear(g.norm(x, "n1", eps=1e-5), "gate_up"), "silu")
    down = g.linear(hidden, "down")
    y = g.linear(g.norm(g.add(x, down), "n2", eps=1e-6), "qkv")
    ops = [record.op for record in fuse(g.program(qkv=y, hidden=hidden)).records]
    assert "layer_chain" not in ops
    assert "layer_chain" in [record.op for record in fuse(g.program(qkv=y)).records]
