"""Times the dense kernels on real shapes, each candidate tile against the library, and prints the table's winners.

    python -m tokenspeed.bench.gpu.dense [--model llama-3.1-8b] [--format bf16|fp8] [--rows 1] [--only qkv] [--jobs 12]

Every case runs in one CUDA graph over rotating weights that the second-level cache cannot hold, the way a decode step
runs them. `us` is the median of replays, divided by the launches of one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from triton.runtime.errors import OutOfResources

from tokenspeed.bench.gpu.dense_candidates import gemv_candidates, skinny_candidates
from tokenspeed.bench.gpu.graph_timing import CEILING_GBS, write_timed
from tokenspeed.kernels.triton import norm as row_kernels
from tokenspeed.kernels.triton.linear import gemv, skinny
from tokenspeed.kernels.triton.operands import Multiplied, Norm, Prologue, Rows
from tokenspeed.kernels.triton.tiles import GemvTile, SkinnyTile
from tokenspeed.quantization.fp8 import Fp8Weight, quantize_fp8

ROTATED_BYTES = 256 * 2**20
LAUNCHES = 96
REPLAYS = 12
ROWS = (1, 2, 4, 8, 16, 32, 64)
Launch = Callable[[], object]
Tile = GemvTile | SkinnyTile


class Case(NamedTuple):
    """bytes and flops of one launch; make(copies) gives a launch per copy of the weights. key: the tile table's."""

    name: str
    bytes: int
    flops: int
    make: Callable[[int], list[Launch]]
    key: tuple[int, int, int, int] | None = None
    tile: Tile | None = None


@dataclass(frozen=True)
class Shape:
    """A projection of a model: stored rows of W, columns, what is fused around it."""

    model: str
    name: str
    n: int
    k: int
    prologue: str = "none"
    act: str = "none"


def _shapes(model: str, hidden: int, qkv: int, ff: int, vocab: int) -> list[Shape]:
    return [
        Shape(model, "qkv", qkv, hidden, "join"),
        Shape(model, "o", hidden, hidden),
        Shape(model, "gate_up", 2 * ff, hidden, "join", "silu"),
        Shape(model, "down", hidden, ff),
        Shape(model, "head", vocab, hidden, "norm"),
    ]


SHAPES = [
    *_shapes("llama-3.2-1b", 2048, 3072, 8192, 128256),
    *_shapes("llama-3.1-8b", 4096, 6144, 14336, 128256),
]


def cases(
    models: Sequence[str] = ("llama-3.2-1b", "llama-3.1-8b"),
    formats: Sequence[str] = ("bf16", "fp8"),
    rows: Sequence[int] = ROWS,
    only: str = "",
) -> list[Case]:
    """Every case to time; `only` keeps names that contain it."""
    chosen = [shape for shape in SHAPES if shape.model in models]
    made = [case for shape in chosen for fmt in formats for t in rows for case in _projection_cases(shape, fmt, t)]
    made += [case for width in (2048, 4096) for t in rows for case in _row_cases(width, t)]
    return [case for case in made if only in case.name]


def _projection_cases(shape: Shape, fmt: str, rows: int) -> Iterator[Case]:
    if shape.name == "head" and fmt == "fp8":
        return
    item = 2 if fmt == "bf16" else 1
    n = shape.n if shape.act == "none" else shape.n // 2
    moved = shape.n * shape.k * item + 2 * rows * (shape.k + n)
    flops = 2 * rows * shape.n * shape.k
    stem = f"{shape.model} {shape.name} {fmt} B{rows}"
    yield Case(f"{stem} library", moved, flops, lambda copies: _library(shape, fmt, rows, copies))
    padded = 1 << (rows - 1).bit_length()
    if rows <= 4:
        for tile in gemv_candidates(padded, item):
            run = _fused(shape, fmt, rows, tile)
            yield Case(f"{stem} fused {_text(tile)}", moved, flops, run, (padded, shape.n, shape.k, item), tile)
        if shape.prologue != "none":
            plain = gemv_candidates(padded, item)[0]
            yield Case(f"{stem} norm apart {_text(plain)}", moved, flops, _apart(shape, fmt, rows, plain))
    if rows > 1:
        key = (max(16, padded), shape.n, shape.k, item)
        for skinny_tile in skinny_candidates(key[0], shape.n, shape.k, item):
            run = _skinny(shape, fmt, rows, skinny_tile)
            yield Case(f"{stem} skinny {_text(skinny_tile)}", moved, flops, run, key, skinny_tile)


def _row_cases(width: int, rows: int) -> Iterator[Case]:
    for name, quantize in (("bf16", False), ("fp8", True)):
        moved = rows * width * (2 * 3 + (1 if quantize else 2)) + 4 * width

        def make(copies: int, quantize: bool = quantize) -> list[Launch]:
            x, norm = _random(rows, width), Norm(torch.ones(width, device="cuda"), 1e-5)
            return [lambda: row_kernels.norm_rows(x, norm, x, quantize=quantize)] * copies

        yield Case(f"rows{width} join_norm {name} B{rows}", moved, 0, make)


def _random(rows: int, cols: int) -> torch.Tensor:
    return torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)


def _weights(shape: Shape, fmt: str, copies: int) -> list[Multiplied]:
    plain = [_random(shape.n, shape.k) for _ in range(1 if fmt == "fp8" else copies)]
    if fmt == "bf16":
        return list(plain)
    first = quantize_fp8(plain[0])
    return [Fp8Weight(first.q.clone(), first.scale.clone()) for _ in range(copies)]


def _before(shape: Shape, rows: int) -> tuple[torch.Tensor, Prologue | None]:
    x = _random(rows, shape.k)
    if shape.prologue == "none":
        return x, None
    norm = Norm(torch.ones(shape.k, device="cuda"), 1e-5)
    return x, Prologue(norm, _random(rows, shape.k) if shape.prologue == "join" else None)


def _fused(shape: Shape, fmt: str, rows: int, tile: GemvTile) -> Callable[[int], list[Launch]]:
    def make(copies: int) -> list[Launch]:
        x, prologue = _before(shape, rows)
        return [lambda w=w: gemv(x, w, None, shape.act, prologue, tile) for w in _weights(shape, fmt, copies)]  # type: ignore[misc]

    return make


def _apart(shape: Shape, fmt: str, rows: int, tile: GemvTile) -> Callable[[int], list[Launch]]:
    def make(copies: int) -> list[Launch]:
        x, prologue = _before(shape, rows)
        assert prologue is not None

        def launch(w: Multiplied) -> object:
            y, _ = row_kernels.norm_rows(x, prologue.norm, prologue.branch)
            return gemv(y.values, w, None, shape.act, None, tile)

        return [lambda w=w: launch(w) for w in _weights(shape, fmt, copies)]  # type: ignore[misc]

    return make


def _prepare(x: torch.Tensor, prologue: Prologue | None, fmt: str) -> Rows:
    if prologue is None and fmt == "bf16":
        return Rows(x)
    norm, branch = (prologue.norm, prologue.branch) if prologue else (None, None)
    return row_kernels.norm_rows(x, norm, branch, quantize=fmt == "fp8")[0]


def _skinny(shape: Shape, fmt: str, rows: int, tile: SkinnyTile) -> Callable[[int], list[Launch]]:
    def make(copies: int) -> list[Launch]:
        x, prologue = _before(shape, rows)

        def launch(w: Multiplied) -> object:
            return skinny(_prepare(x, prologue, fmt), w, x.dtype, None, shape.act, tile)

        return [lambda w=w: launch(w) for w in _weights(shape, fmt, copies)]  # type: ignore[misc]

    return make


def _library(shape: Shape, fmt: str, rows: int, copies: int) -> list[Launch]:
    x, prologue = _before(shape, rows)

    def launch(w: Multiplied) -> object:
        given = _prepare(x, prologue, fmt)
        if isinstance(w, Fp8Weight):
            assert given.scale is not None
            scales = {"scale_a": given.scale[:, None], "scale_b": w.scale[None, :]}
            y = torch._scaled_mm(given.values, w.q.t(), **scales, out_dtype=x.dtype, use_fast_accum=True)
        else:
            y = F.linear(given.values, w)
        return y if shape.act == "none" else row_kernels.act_mul(y, shape.act)

    return [lambda w=w: launch(w) for w in _weights(shape, fmt, copies)]  # type: ignore[misc]


def _text(tile: Tile) -> str:
    end = "" if tile.pdl else " without pdl"
    if isinstance(tile, GemvTile):
        return f"{tile.block_n}x{tile.block_k} w{tile.warps}{end}"
    return f"{tile.block_n}x{tile.block_k} k/{tile.split_k} w{tile.warps} s{tile.stages} p{tile.prefetch}{end}"


def microseconds(case: Case) -> float:
    """Median time of one launch inside a graph."""
    copies = max(2, min(LAUNCHES, -(-ROTATED_BYTES // case.bytes)))
    launches = case.make(copies)
    order = list(islice(cycle(launches), copies * -(-LAUNCHES // copies)))
    launches[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in order:
            launch()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 3)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(events[2:])]
    return statistics.median(times) * 1000 / len(order)


def _warm(selection: tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...], str], index: int) -> None:
    case = cases(*selection)[index]
    try:
        case.make(1)[0]()
        torch.cuda.synchronize()
    except OutOfResources:
        pass  # said when it is timed
    torch.cuda.empty_cache()


def _report(case: Case, us: float) -> None:
    rate = case.bytes / us / 1e6
    print(
        f"{case.name:72} {us:9.2f} us {rate * 1000:7.0f} GB/s {1e5 * rate / CEILING_GBS:5.1f} % of {CEILING_GBS:.0f} "
        f"GB/s {case.flops / us / 1e6:7.1f} TFLOP/s",
        flush=True,
    )


def _winners(timed: Sequence[tuple[Case, float]]) -> None:
    """The fastest tile of each table entry, as lines of `kernels/triton/tiles.py`."""
    best: dict[tuple[str, tuple[int, int, int, int]], tuple[Case, float]] = {}
    for case, us in timed:
        if case.key is None or case.tile is None:
            continue
        entry = (type(case.tile).__name__, case.key)
        if entry not in best or us < best[entry][1]:
            best[entry] = (case, us)
    for (_, key), (case, us) in sorted(best.items()):
        print(f"    {key}: {case.tile!r},  # {us:.2f} us, {' '.join(case.name.split()[:4])}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, compile in parallel, time one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", nargs="*", default=["llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--format", nargs="*", default=["bf16", "fp8"])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--only", default="", help="keep cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile beforehand; 0 for none")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of records to add to")
    args = parser.parse_args(arguments)
    selection = (tuple(args.model), tuple(args.format), tuple(args.rows), args.only)
    chosen = cases(*selection)
    if args.jobs:
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            pool.starmap(_warm, [(selection, i) for i in range(len(chosen))], chunksize=4)
    timed = []
    for case in chosen:
        try:
            us = microseconds(case)
        except OutOfResources as error:
            print(f"{case.name:72} does not fit: {error}", flush=True)
            continue
        timed.append((case, us))
        _report(case, us)
    _winners(timed)
    if args.out is not None:
        write_timed(args.out, "dense", [(case.name, case.bytes, us) for case, us in timed])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
