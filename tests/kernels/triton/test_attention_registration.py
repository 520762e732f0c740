"""What the registry gives for a fused program's attention records, run against the references of their parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.triton.paged_step import GROUP, PagedCase, check
from tests.seeds import SEED
from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.kernels.triton import attention_registration, attention_tiles
from tokenspeed.kernels.triton.attention_registration import register, run_decode, run_prefill
from tokenspeed.kernels.triton.attention_tiles import item_tokens, max_items
from tokenspeed.kernels.triton.paged import Heads
from tokenspeed.kernels.triton.work_items import StepRows, make_items
from tokenspeed.layers.attention import Attention, attention_block
from tokenspeed.ops.reference import REFERENCE, StepView
from tokenspeed.ops.rope import Rope
from tokenspeed.program.fuse import fuse
from tokenspeed.program.program import Program, Record
from tokenspeed.program.recorder import Recorder

HEADS = Heads(4, 2, 64, 0.125, 0)
LAYER = 1


def program(heads: Heads, normed: bool) -> Program:
    q, kv, d = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim, heads.head_dim
    shapes: dict[str, tuple[int, ...]] = {"table": (9, 8), "qkv": (q + 2 * kv, 8), "o": (8, q)}
    shapes |= {"q_norm": (d,), "k_norm": (d,)} if normed else {}
    g = Recorder(shapes)
    spec = Attention(d, Rope(1e4, d), heads.scale, heads.window, 1e-6)
    return fuse(g.program(out=attention_block(g, g.embed(g.tokens, "table"), g.weights(), LAYER, spec)))


def attention_of(fused: Program, op: str) -> Record:
    """The program's attention, alone or with what is fused to it."""
    group = next(record for record in fused.records if record.op == "rope_attention")
    return group if op == group.op else list(group.plain())[-1]


def reference_view(case: PagedCase) -> StepView:
    """The same step for the references; rows must be without padding."""
    step, context = case.step, [before + fed for before, fed, _ in case.rows]
    tables = step.block_tables.long()
    owner, position = step.slots.long(), step.positions.long()
    at = tables[:, owner, position // step.page_size] * step.page_size + position % step.page_size
    starts = torch.tensor([0, *(fed for _, fed, _ in case.rows)]).cumsum(0).tolist()
    per_row = [[tables[group, slot] for group in range(len(tables))] for slot in case.slot_of]
    no_rows = torch.empty(0, dtype=torch.int64)
    return StepView(position, position, at, starts, context, per_row, step.places, step.kv.clone(), no_rows)


def with_items(case: PagedCase) -> PagedCase:
    """The case's step with work lists, rows of one token apart."""
    fed = [row[1] for row in case.rows]
    starts = torch.tensor([0, *fed]).cumsum(0)[:-1].tolist()
    columns = torch.tensor([case.slot_of, starts, fed, [row[0] for row in case.rows]], dtype=torch.int32)
    rows = StepRows(columns[0], columns[1], columns[2], columns[3], torch.tensor([len(fed)], dtype=torch.int32))
    per_item = item_tokens(case.heads.heads, case.heads.kv_heads, case.heads.head_dim, case.dtype.itemsize)
    items = torch.empty(max_items(sum(fed), len(fed), per_item), 4, dtype=torch.int32)
    alone = torch.empty(len(fed), dtype=torch.int32)
    make_items(rows, sum(fed), per_item, items, alone)
    case.step = replace(case.step, items=items, decode_rows=alone)
    return case


def lowered(registry: Registry, fused: Program, record: Record, tokens: int) -> Iterator[tuple[Record, Implementation]]:
    """What a plan for a bucket of `tokens` makes of a record."""
    chosen = registry.choose(record.op, fused.operands(record), Situation("cuda", "float32", tokens, {}))
    if chosen is not None:
        yield record, chosen
        return
    for part in record.parts:
        yield from lowered(registry, fused, part, tokens)


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize(
    "rows, normed, tokens, ran",
    [
        ([(5, 3, 0), (33, 1, 0)], False, 8, ["rope_write", "decode_attention"]),
        ([(5, 1, 0), (33, 1, 0), (0, 1, 0)], True, 8, ["rope_attention"]),
        ([(5, 3, 0), (33, 1, 0)], True, 128, ["rope_write", "decode_attention"]),
    ],
    ids=["several of a sequence", "one each", "large bucket"],
)
def test_chosen_kernels_give_what_the_parts_give(monkeypatch, seed, rows, normed, tokens, ran):
    for sequences in attention_tiles.DECODE:
        monkeypatch.setitem(attention_tiles.DECODE, sequences, attention_tiles.DecodeTile(1, 16, 1, 4, 2))
        monkeypatch.setitem(attention_tiles.FUSED_SPLITS, sequences, 1)
    called = []
    for name in ("rope_write", "decode_attention", "rope_attention"):
        monkeypatch.setattr(attention_registration, name, told(getattr(attention_registration, name), name, called))
    case = PagedCase(rows, HEADS, 16, seed)
    case = with_items(case) if tokens > 64 else case
    case.step = replace(case.step, one_each=all(fed == 1 for _, fed, _ in rows))
    fused, registry, view = program(HEADS, normed), Registry(), reference_view(case)
    register(registry)
    sizes = [HEADS.heads * 64, HEADS.kv_heads * 64, HEADS.kv_heads * 64]
    record = next(r for r in fused.records if r.op.endswith("rope_attention"))
    given = case.random(len(case.step.positions), sum(sizes)).split(sizes, dim=-1)
    values, expected = (dict(zip(record.inputs, given, strict=True)) for _ in range(2))
    weights = {name: 1 + 0.3 * case.random(64) for name in record.weights}
    for part in record.plain():
        inputs = [expected[v] for v in part.inputs], [weights[name] for name in part.weights]
        expected.update(zip(part.outputs, REFERENCE[part.op](view, *inputs, part.attrs), strict=True))
    for part, chosen in lowered(registry, fused, record, tokens):
        inputs = [values[v] for v in part.inputs], [weights[name] for name in part.weights]
        values.update(zip(part.outputs, chosen.run(case.step, part, *inputs), strict=True))
    assert called == ran
    check(values[record.outputs[0]], expected[record.outputs[0]].double(), torch.float32)
    written = next(part.outputs[0] for part in record.plain() if part.op == "kv_write")
    mine, theirs = case.step.kv[:, case.step.places[LAYER][GROUP]], expected[written]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=3e-6, equal_nan=True)


def told(run: Any, name: str, called: list[str]) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return run(*args, **kwargs)

    return noted


@pytest.mark.parametrize(
    "heads, situation",
    [
        (HEADS, Situation("cpu", "float32", 8, {})),
        (HEADS, Situation("cuda", "float64", 8, {})),
        (Heads(65, 1, 64, 1.0, 0), Situation("cuda", "bfloat16", 8, {})),
        (Heads(2, 1, 320, 1.0, 0), Situation("cuda", "bfloat16", 128, {})),
    ],
    ids=["cpu", "float64", "wide group", "wide head"],
)
def test_nothing_is_offered_beyond_the_limits(heads, situation):
    registry, fused = Registry(), program(heads, False)
    register(registry)
    usual, plain = replace(situation, device="cuda", dtype="bfloat16", tokens=8), program(HEADS, False)
    for op in ("attention", "rope_attention"):
        assert registry.choose(op, fused.operands(attention_of(fused, op)), situation) is None
        assert registry.choose(op, plain.operands(attention_of(plain, op)), usual) is not None
    large = replace(usual, tokens=128)
    assert registry.choose("rope_attention", plain.operands(attention_of(plain, "rope_attention")), large) is None
    assert registry.choose("attention", plain.operands(attention_of(plain, "attention")), large) is not None


def test_without_work_items_every_token_is_a_sequence_of_its_own():
    case = PagedCase([(0, 2, 0)], HEADS, 16, SEED)
    attend = attention_of(program(HEADS, False), "attention")
    (found,) = run_prefill(case.step, attend, [case.q], [])
    (wanted,) = run_decode(case.step, attend, [case.q], [])
    assert found.abs().sum() > 0
    assert torch.equal(found, wanted)
