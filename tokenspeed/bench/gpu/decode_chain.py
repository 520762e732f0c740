"""One layer's attention part of a decode step, in one kernel and in two, with and without the projection behind it.

`python -m tokenspeed.bench.gpu.decode_chain [--check] [WORD ...]`: only cases whose name has all the words are
measured; --check compares the fused kernel with torch and with the pair first and ends with 1 where they differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import lru_cache, partial

import torch

from tokenspeed.bench.gpu.attention import MODELS, TOLERANCE
from tokenspeed.bench.gpu.graph_timing import Case, Launch, print_table
from tokenspeed.bench.gpu.paged_steps import L2_BYTES, PagedStep, paged_step
from tokenspeed.kernels.triton.attention_tiles import MAX_SPLITS, FusedTile, decode_tile, fused_tile
from tokenspeed.kernels.triton.decode_attention import decode_attention
from tokenspeed.kernels.triton.launch import processors, small_step
from tokenspeed.kernels.triton.linear import project
from tokenspeed.kernels.triton.operands import Matrix
from tokenspeed.kernels.triton.paged import Heads
from tokenspeed.kernels.triton.rope_attention import AFTER_KEYS, BEFORE_WAIT, rope_attention
from tokenspeed.kernels.triton.rope_write import rope_write
from tokenspeed.ops.rope import Rope
from tokenspeed.quantization.fp8 import quantize_fp8

BATCHES, CONTEXTS, PAGE = (1, 8, 32), (1024, 8192, 32768), 64
H200_PROCESSORS = 132
ROPE_BASE = 5e5
WHEN = {0: "never", BEFORE_WAIT: "before-wait", AFTER_KEYS: "after-keys"}
Rows = tuple[tuple[int, int], ...]


@lru_cache(maxsize=1)
def _step(rows: Rows, heads: Heads) -> PagedStep:
    return paged_step(rows, heads, PAGE)


@lru_cache(maxsize=1)
def _projections(width: int, fp8: bool) -> list[Matrix]:
    """Square weights that together exceed the second-level cache four times."""
    count = int(4 * L2_BYTES / (width * width * (1 if fp8 else 2))) + 1
    plain = (torch.randn(width, width, device="cuda").bfloat16() * width**-0.5 for _ in range(count))
    return [quantize_fp8(weight) if fp8 else weight for weight in plain]


def _qkv(tokens: int, heads: Heads) -> tuple[torch.Tensor, ...]:
    size = heads.kv_heads * heads.head_dim
    qkv = torch.randn(tokens, (heads.group + 2) * size, device="cuda").bfloat16()
    return qkv.split([heads.group * size, size, size], dim=-1)


def _chain(rows: Rows, heads: Heads, tile: FusedTile | None, weights: str) -> Launch:
    """The fused kernel with a tile, or the pair; then a projection by `weights`, none, bf16 or fp8."""
    step, rope = _step(rows, heads), Rope(ROPE_BASE, heads.head_dim)
    q, k, v = _qkv(len(rows), heads)
    usual, pdl = decode_tile(len(rows), heads.kv_heads, heads.head_dim, 2), small_step(q)
    matrices = _projections(q.shape[1], weights == "fp8") if weights != "none" else []

    def launch(i: int) -> None:
        paged, behind = step.layer(i), matrices[i % len(matrices)] if matrices else None
        if tile is None:
            out = decode_attention(rope_write(q, k, v, paged, rope, pdl=pdl), paged, heads, usual, pdl=pdl)
        else:
            out = rope_attention(q, k, v, paged, rope, heads, tile, ahead=behind, pdl=pdl)
        if behind is not None:
            project(out, behind)

    return launch


def candidates(usual: FusedTile) -> Iterator[FusedTile]:
    """The table's tile, and those with one thing changed."""
    yield usual
    yield usual._replace(held=not usual.held)
    for warm in (1, 2, 4):
        yield usual._replace(warm=warm)
    for programs in (usual.programs // 2, usual.programs * 3 // 4, usual.programs * 3 // 2):
        yield usual._replace(programs=programs, splits=max(1, usual.splits * programs // usual.programs))
    for blocks in (1, 2, 4, 8):
        yield usual._replace(programs=0, min_blocks=blocks)
    for splits in (usual.splits // 2, min(MAX_SPLITS, usual.splits * 2)):
        yield usual._replace(splits=splits)
    yield usual._replace(keys=usual.keys // 2, min_blocks=usual.min_blocks * 2)
    for stages in (3, 7):
        yield usual._replace(stages=stages)
    yield usual._replace(warps=8)


def cases(count: int = H200_PROCESSORS) -> Iterator[Case]:
    """Every case, in the order of its shape, for a device of so many processors."""
    for model, heads in MODELS.items():
        for batch in BATCHES:
            for context in CONTEXTS:
                rows = ((context - 1, 1),) * batch
                usual = fused_tile(batch, heads.kv_heads, heads.head_dim, 2, count)
                name, moved = f"chain {model} B={batch} ctx={context}", _moved(rows, heads)
                yield Case(f"{name} apart alone", *moved, partial(_chain, rows, heads, None, "none"))
                for tile in candidates(usual):
                    make = partial(_chain, rows, heads, tile, "none")
                    yield Case(f"{name} fused alone {_short(tile)}", *moved, make)
                yield from _with_projection(name, rows, heads, usual, moved)


def _with_projection(
    name: str, rows: Rows, heads: Heads, usual: FusedTile, moved: tuple[float, float]
) -> Iterator[Case]:
    width = heads.heads * heads.head_dim
    for weights, item in (("bf16", 2), ("fp8", 1)):
        total = moved[0] + item * width * width, moved[1] + 2 * len(rows) * width * width
        yield Case(f"{name} apart o-{weights}", *total, partial(_chain, rows, heads, None, weights))
        for when, word in WHEN.items():
            tile = usual._replace(ahead=when)
            yield Case(f"{name} fused o-{weights} ahead={word}", *total, partial(_chain, rows, heads, tile, weights))


def _moved(rows: Rows, heads: Heads) -> tuple[float, float]:
    """Bytes in bf16 of keys, values, their new entries, queries and results; operations."""
    size, keys = heads.kv_heads * heads.head_dim, sum(before + 1 for before, _ in rows)
    return 4 * size * (keys + (heads.group + 1) * len(rows)), 4 * heads.heads * heads.head_dim * keys


def _short(tile: FusedTile) -> str:
    return " ".join(f"{name}={int(value)}" for name, value in tile._asdict().items() if name != "ahead_bytes")


def check() -> bool:
    """Whether the fused kernel gives what the pair and torch give, in bf16, again and again."""
    good = True
    for heads in (*MODELS.values(), Heads(4, 1, 256, 1 / 16, 512), Heads(28, 4, 128, 0.09, 0)):
        step = paged_step([(0, 1), (776, 1), (4096, 1), (63, 1), (64, 1), (20000, 1)], heads, PAGE, layers=1)
        q, k, v = _qkv(6, heads)
        rope, paged, pdl = Rope(ROPE_BASE, heads.head_dim), step.layer(0), small_step(q)
        rotated = rope_write(q, k, v, paged, rope)
        expected, written = step.answer(rotated, heads), paged.kv.clone()
        weight = torch.randn(4096, 4096, device="cuda").bfloat16()
        usual = fused_tile(6, heads.kv_heads, heads.head_dim, 2, processors(q.device))
        for tile in (usual, usual._replace(held=not usual.held, warm=2, ahead=1), usual._replace(programs=0, ahead=2)):
            outs = [rope_attention(q, k, v, paged, rope, heads, tile, ahead=weight, pdl=pdl) for _ in range(50)]
            worst = max(float((out.float() - expected).abs().max()) for out in outs)
            same = all(torch.equal(out, outs[0]) for out in outs)
            kept = torch.equal(paged.kv.view(torch.int16), written.view(torch.int16))
            fine = worst <= TOLERANCE and same and kept
            print(f"{'ok' if fine else 'WRONG':6} {worst:.4f} repeats={same} pages={kept}  {heads} {_short(tile)}")
            good &= fine
    return good


def main() -> int:
    """Check, then measure what is asked for; 1 where the check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with torch first")
    parser.add_argument("words", nargs="*", help="measure cases whose names have all of these")
    args = parser.parse_args()
    if args.check and not check():
        return 1
    device = torch.device("cuda")
    print_table(case for case in cases(processors(device)) if all(word in case.name.split() for word in args.words))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
