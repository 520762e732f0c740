"""What the registry gives for a fused program's attention records, run against the references of their parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.triton.paged_step import GROUP, PagedCase, check
from tests.seeds import SEED
from tokenspeed.kernels.registry import Registry, Situation
from tokenspeed.kernels.triton import attention_registration, attention_tiles
from tokenspeed.kernels.triton.attention_registration import register, run_decode, run_prefill, run_rope_write
from tokenspeed.kernels.triton.attention_tiles import item_tokens, max_items
from tokenspeed.kernels.triton.paged import Heads, heads_of
from tokenspeed.kernels.triton.work_items import StepRows, make_items
from tokenspeed.layers.attention import Attention, attention_block
from tokenspeed.ops.definitions import UNSCALED, KvScale
from tokenspeed.ops.reference import REFERENCE, StepView
from tokenspeed.ops.rope import Rope
from tokenspeed.program.fuse import fuse
from tokenspeed.program.kv_scale import with_kv_scales
from tokenspeed.program.program import Program, Record
from tokenspeed.program.recorder import Recorder

HEADS = Heads(4, 2, 64, 0.125, 0)
LAYER = 1


def program(heads: Heads, normed: bool, scales: dict[int, KvScale] | None = None) -> Program:
    q, kv, d = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim, heads.head_dim
    shapes: dict[str, tuple[int, ...]] = {"table": (9, 8), "qkv": (q + 2 * kv, 8), "o": (8, q)}
    shapes |= {"q_norm": (d,), "k_norm": (d,)} if normed else {}
    g = Recorder(shapes)
    spec = Attention(d, Rope(1e4, d, scale=1.2), heads.scale, heads.window, 1e-6, False, heads.softcap)
    made = g.program(out=attention_block(g, g.embed(g.tokens, "table"), g.weights(), LAYER, spec))
    return fuse(with_kv_scales(made, scales or {}))


def attention_of(fused: Program) -> tuple[Record, Record]:
    """The write and the attention of a program's one group of both."""
    write, attend = next(record.parts for record in fused.records if record.op.endswith("rope_attention"))
    return write, attend


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


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("normed, tokens, softcap", [(False, 8, 0.9), (True, 128, 0.0)])
def test_chosen_kernels_give_what_the_parts_give(monkeypatch, seed, normed, tokens, softcap):
    for sequences in attention_tiles.DECODE:
        monkeypatch.setitem(attention_tiles.DECODE, sequences, attention_tiles.DecodeTile(1, 16, 1, 4, 2))
    heads = HEADS._replace(softcap=softcap)
    case = with_items(PagedCase([(5, 3, 0), (33, 1, 0)], heads, 16, seed))
    fused, registry, view = program(heads, normed), Registry(), reference_view(case)
    register(registry)
    sizes = [HEADS.heads * 64, HEADS.kv_heads * 64, HEADS.kv_heads * 64]
    write, attend = attention_of(fused)
    values = dict(zip(write.inputs, case.random(4, sum(sizes)).split(sizes, dim=-1), strict=True))
    expected = dict(values)
    weights = {name: 1 + 0.3 * case.random(64) for name in write.weights}
    for record in (write, attend):
        for part in record.plain():
            given = [expected[v] for v in part.inputs], [weights[name] for name in part.weights]
            expected.update(zip(part.outputs, REFERENCE[part.op](view, *given, part.attrs), strict=True))
        situation = Situation("cuda", "float32", tokens, {})
        chosen = registry.choose(record.op, fused.operands(record), situation)
        assert chosen is not None
        given = [values[v] for v in record.inputs], [weights[name] for name in record.weights]
        values.update(zip(record.outputs, chosen.run(case.step, record, *given), strict=True))
    for value in (write.outputs[0], attend.outputs[0]):
        check(values[value], expected[value].double(), torch.float32)
    mine, theirs = case.step.kv[:, case.step.places[LAYER][GROUP]], expected[write.outputs[1]]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("normed", [False, True])
def test_scales_of_the_layer_reach_the_kernels(monkeypatch, normed):
    scale = KvScale(3.0, 0.5)
    case = PagedCase([(5, 3, 0)], HEADS, 16, SEED)
    sizes = [HEADS.heads * 64, HEADS.kv_heads * 64, HEADS.kv_heads * 64]
    given = case.random(3, sum(sizes)).split(sizes, dim=-1)
    seen: list[KvScale] = []
    monkeypatch.setattr(attention_registration, "rope_write", lambda *_, kv_scale, **__: seen.append(kv_scale))
    for scales in ({LAYER: scale}, {LAYER + 1: scale}, {}):
        whole = next(r for r in program(HEADS, normed, scales).records if r.op.endswith("rope_attention"))
        write, attend = whole.parts
        weights = [case.random(64) for _ in write.weights]
        run_rope_write(case.step, write, given, weights)
        run_rope_write(case.step, whole, given, weights)
        wanted = scales.get(LAYER, UNSCALED)
        assert seen[-2:] == [wanted] * 2
        assert heads_of(attend.attrs).kv_scale == heads_of(whole.attrs).kv_scale == wanted


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
    _, attend = attention_of(fused)
    assert registry.choose("attention", fused.operands(attend), situation) is None
    usual = replace(situation, device="cuda", dtype="bfloat16")
    _, attend = attention_of(program(HEADS, False))
    assert registry.choose("attention", program(HEADS, False).operands(attend), usual) is not None


def test_without_work_items_every_token_is_a_sequence_of_its_own():
    case = PagedCase([(0, 2, 0)], HEADS, 16, SEED)
    _, attend = attention_of(program(HEADS, False))
    (found,) = run_prefill(case.step, attend, [case.q], [])
    (wanted,) = run_decode(case.step, attend, [case.q], [])
    assert found.abs().sum() > 0
    assert torch.equal(found, wanted)
