"""Paged attention and KV writes on a GPU: `python -m tokenspeed.bench.gpu.attention [--check] [WORD ...]`.

Prints each case's tile candidates: the table's own, then one figure changed at a time. Only cases whose name has all
the words are measured; --check compares the kernels with torch first and ends with 1 where they differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import torch

from tokenspeed.bench.gpu import prefill
from tokenspeed.bench.gpu.graph_timing import Case, Launch, run_table
from tokenspeed.bench.gpu.paged_steps import PagedStep, paged_step
from tokenspeed.kernels.cuda.registration import hopper
from tokenspeed.kernels.triton.attention_tiles import (
    MAX_SPLITS,
    DecodeTile,
    PrefillTile,
    decode_tile,
    pad,
    prefill_tile,
)
from tokenspeed.kernels.triton.decode_attention import decode_attention
from tokenspeed.kernels.triton.launch import small_step
from tokenspeed.kernels.triton.paged import Heads
from tokenspeed.kernels.triton.prefill_attention import prefill_attention
from tokenspeed.kernels.triton.rope_write import rope_write
from tokenspeed.ops.rope import Rope

MODELS = {"1b": Heads(32, 8, 64, 64**-0.5, 0), "8b": Heads(32, 8, 128, 128**-0.5, 0)}
DECODE = ((1, 1024), (1, 8192), (1, 32768), (8, 1024), (32, 1024), (64, 1024), (128, 1024))
"""Sequences, context."""
PREFILL = ((0, 1024), (0, 4096), (0, 8192), (7680, 512))
"""Tokens before, tokens fed."""
PAGES = (16, 64)
TOLERANCE = 0.02
"""Absolute, bf16 outputs of unit-scale values: weights and results have 8 bits."""


@lru_cache(maxsize=1)
def _step(rows: tuple[tuple[int, int], ...], heads: Heads, page: int) -> PagedStep:
    return paged_step(rows, heads, page)


def _query(step: PagedStep, heads: Heads) -> torch.Tensor:
    return torch.randn(len(step.positions), heads.heads * heads.head_dim, device="cuda").bfloat16()


def decode_candidates(usual: DecodeTile) -> Iterator[DecodeTile]:
    """The table's tile, and those with one figure changed."""
    yield usual
    for splits in (usual.splits // 2, usual.splits * 2):
        if 1 <= splits <= MAX_SPLITS:
            yield usual._replace(splits=splits)
    for blocks in (usual.min_blocks // 2, usual.min_blocks * 2):
        if blocks >= 1:
            yield usual._replace(min_blocks=blocks)
    for stages in (3, 7):
        yield usual._replace(stages=stages)
    yield usual._replace(keys=usual.keys // 2, min_blocks=usual.min_blocks * 2)
    yield usual._replace(keys=usual.keys * 2, min_blocks=max(1, usual.min_blocks // 2))
    for warps in (2, 8):
        yield usual._replace(warps=warps)


def prefill_candidates(usual: PrefillTile) -> Iterator[PrefillTile]:
    """The table's tile, and others that fit."""
    yield usual
    for rows, keys, warps, stages in (
        (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
        (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 3), (128, 32, 8, 4),
        (256, 64, 8, 3), (256, 64, 16, 3),
    ):  # fmt: skip
        if PrefillTile(rows, keys, warps, stages) != usual:
            yield PrefillTile(rows, keys, warps, stages)


def _decode(rows: tuple[tuple[int, int], ...], heads: Heads, page: int, tile: DecodeTile, pdl: bool) -> Launch:
    step = _step(rows, heads, page)
    q = _query(step, heads)
    pdl = pdl and small_step(q)
    return lambda i: decode_attention(q, step.layer(i), heads, tile, pdl=pdl)


def _prefill(rows: tuple[tuple[int, int], ...], heads: Heads, page: int, tile: PrefillTile) -> Launch:
    step = _step(rows, heads, page)
    q, (items, _) = _query(step, heads), step.items(tile.rows // pad(heads.group))
    return lambda i: prefill_attention(q, step.layer(i), items, heads, tile)


def _prefill_cuda(rows: tuple[tuple[int, int], ...], heads: Heads, page: int) -> Launch:
    step = _step(rows, heads, page)
    q, items = _query(step, heads), prefill.items_of(step, heads)
    return lambda i: prefill.by_cuda(q, step.layer(i), items, heads)


def _mixed(rows: tuple[tuple[int, int], ...], heads: Heads, page: int, apart: bool) -> Launch:
    """The table's tiles; decoding rows as items, or by the decode kernel."""
    step, tile = _step(rows, heads, page), prefill_tile(heads.head_dim, 2)
    few = decode_tile(len(rows), heads.kv_heads, heads.head_dim, 2)
    q, (items, alone) = _query(step, heads), step.items(tile.rows // pad(heads.group), decode_rows=apart)

    def launch(i: int) -> None:
        out = prefill_attention(q, step.layer(i), items, heads, tile)
        if alone is not None:
            decode_attention(q, step.layer(i), heads, few, rows=alone, out=out)

    return launch


def _write(tokens: int, heads: Heads, page: int) -> Launch:
    step = _step(((0, tokens),), heads, page)
    size = heads.kv_heads * heads.head_dim
    qkv = torch.randn(tokens, (heads.group + 2) * size, device="cuda").bfloat16()
    q, k, v = qkv.split([heads.group * size, size, size], dim=-1)
    rope = Rope(5e5, heads.head_dim)
    return lambda i: rope_write(q, k, v, step.layer(i), rope, pdl=small_step(q))


def _moved(rows: tuple[tuple[int, int], ...], heads: Heads) -> tuple[float, float]:
    """Bytes in bf16 of keys, values, queries and results; operations."""
    keys = 4 * heads.kv_heads * heads.head_dim * sum(before + fed for before, fed in rows)
    pairs = sum(fed * before + fed * (fed + 1) / 2 for before, fed in rows)
    width = heads.heads * heads.head_dim
    return keys + 4 * width * sum(fed for _, fed in rows), 4 * width * pairs


def cases() -> Iterator[Case]:
    """Every case, in the order of its shape, so that one shape's pages serve all candidates."""
    for model, heads in MODELS.items():
        for page in PAGES:
            yield from _decode_cases(model, heads, page)
            yield from _prefill_cases(model, heads, page)
        for tokens in (1, 8, 64, 1024):
            kv, wide = 4 * heads.kv_heads * heads.head_dim, 4 * heads.heads * heads.head_dim
            name = f"write {model} T={tokens}"
            yield Case(name, tokens * (2 * kv + wide), 0, partial(_write, tokens, heads, 64))


def _decode_cases(model: str, heads: Heads, page: int) -> Iterator[Case]:
    for batch, context in DECODE:
        rows = ((context - 1, 1),) * batch
        usual = decode_tile(batch, heads.kv_heads, heads.head_dim, 2)
        name = f"decode {model} B={batch} ctx={context} page={page}"
        for tile in decode_candidates(usual):
            make = partial(_decode, rows, heads, page, tile, True)
            yield Case(f"{name} {_short(tile)}", *_moved(rows, heads), make)
        yield Case(f"{name} no-pdl", *_moved(rows, heads), partial(_decode, rows, heads, page, usual, False))


def _prefill_cases(model: str, heads: Heads, page: int) -> Iterator[Case]:
    rows: tuple[tuple[int, int], ...]
    for before, fed in PREFILL:
        rows = ((before, fed),)
        for tile in prefill_candidates(prefill_tile(heads.head_dim, 2)):
            make = partial(_prefill, rows, heads, page, tile)
            name = f"prefill {model} at={before} fed={fed} page={page} {_short(tile)}"
            yield Case(name, *_moved(rows, heads), make)
        if hopper():
            make = partial(_prefill_cuda, rows, heads, page)
            yield Case(f"prefill {model} at={before} fed={fed} page={page} cuda", *_moved(rows, heads), make)
    for batch in (8, 128):
        rows = (*((1023, 1),) * batch, (4096, 512))
        for apart in (False, True):
            name = f"mixed {model} decode={batch} chunk=512 page={page} {'rows apart' if apart else 'items'}"
            yield Case(name, *_moved(rows, heads), partial(_mixed, rows, heads, page, apart))


def _short(tile: DecodeTile | PrefillTile) -> str:
    return " ".join(f"{name}={value}" for name, value in tile._asdict().items())


def check() -> bool:
    """Whether the kernels agree with torch on this device, in bf16, over pages with NaN where nothing was written."""
    good = True
    for heads in (*MODELS.values(), Heads(4, 1, 256, 1 / 16, 512), Heads(28, 4, 128, 0.09, 0)):
        for page in PAGES:
            step = paged_step([(0, 1), (776, 1), (4096, 1)], heads, page, layers=1)
            q = _query(step, heads)
            tile = decode_tile(1, heads.kv_heads, heads.head_dim, 2)
            outs = [decode_attention(q, step.layer(0), heads, tile, pdl=pdl) for pdl in (False, small_step(q))]
            good &= _same(f"decode {heads} page={page}", outs, step.answer(q, heads))
            step = paged_step([(1000, 333), (0, 200), (2500, 1)], heads, page, layers=1)
            q, wide = _query(step, heads), prefill_tile(heads.head_dim, 2)
            items, alone = step.items(wide.rows // pad(heads.group), decode_rows=True)
            out = prefill_attention(q, step.layer(0), items, heads, wide)
            decode_attention(q, step.layer(0), heads, tile, rows=alone, out=out)
            good &= _same(f"prefill {heads} page={page}", [out], step.answer(q, heads))
    return (prefill.check() and good) if hopper() else good


def _same(name: str, outs: list[torch.Tensor], expected: torch.Tensor) -> bool:
    worst = max(float((out.float() - expected).abs().max()) for out in outs)
    good = worst <= TOLERANCE and all(torch.equal(out, outs[0]) for out in outs)
    print(f"{'ok' if good else 'WRONG':6} {worst:.4f}  {name}", flush=True)
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then measure what is asked for; 1 where the check fails."""
    return run_table("attention", __doc__, cases(), check, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
