"""Times every way in which the streaming kernels may divide a projection's rows, beside what takes them now and Triton.

    python -m tokenspeed.bench.gpu.stream_splits [--model gpt-oss-20b] [--only qkv] [--rows 1 8] [--check]

Rows beyond one are normed, and quantised for e4m3 weights, by a kernel of their own, which is timed as well. `us` is
of one projection among many in a graph over weights that the second-level cache cannot hold; `floor` is by their bytes.
--check compares each variant with float64 first, on fresh random data over poisoned memory, one row less than it has
room for included; status 1 where one is wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from tokenspeed.bench.gpu.chain import Projection, matrix, same
from tokenspeed.bench.gpu.dense import ROTATED_BYTES, Case, Launch, microseconds
from tokenspeed.bench.gpu.graph_timing import CEILING_GBS
from tokenspeed.kernels.cuda.program import architecture, compiled, processors
from tokenspeed.kernels.cuda.registration import stream_or_project
from tokenspeed.kernels.cuda.stream import for_outputs, stream, stream_rows
from tokenspeed.kernels.cuda.stream_tiles import FORMATS, MOST_ROWS, Variant, candidates
from tokenspeed.kernels.triton.linear import prepared, project
from tokenspeed.kernels.triton.operands import Matrix, Multiplied, Norm, Prologue, Rows
from tokenspeed.quantization.fp8 import Fp8Weight

CHECKED_OUTPUTS = 5003
"""Several units for a program, the last one ragged."""


class Shape(NamedTuple):
    """A projection of a model. n: stored rows of W; prologue: as `chain.same` names it."""

    model: str
    name: str
    fp8: bool
    n: int
    k: int
    prologue: str = "bare"
    act: str = "none"
    bias: bool = False

    def entering(self, rows: int) -> tuple[torch.Tensor, torch.Tensor | None, Prologue | None]:
        """x, bias and what is done to x before."""
        x, branch = torch.randn(2, rows, self.k, device="cuda").bfloat16()
        norm = Norm(torch.ones(self.k, device="cuda"), 1e-5)
        bias = torch.randn(self.n, device="cuda") if self.bias else None
        return x, bias, None if self.prologue == "bare" else Prologue(norm, branch if self.prologue == "join" else None)

    def variants(self, rows: int) -> list[Variant]:
        """Those that fit."""
        prologue, norm = None, Norm(torch.ones(1), 1e-5)
        if rows == 1 and self.prologue != "bare":
            prologue = Prologue(norm, torch.ones(1) if self.prologue == "join" else None)
        format = FORMATS[Fp8Weight if self.fp8 else torch.Tensor]
        found = list(candidates(self.k, format, self.act, prologue, self.bias, rows))
        if self.fp8 and rows > 1 and self.prologue == "bare":
            found += candidates(self.k, format, self.act, None, self.bias, rows, quantize=True)
        return found


SHAPES = [
    Shape("gpt-oss-20b", "qkv", False, 5120, 2880, "join", bias=True),
    Shape("gpt-oss-20b", "o", False, 2880, 4096, bias=True),
    Shape("gpt-oss-20b", "head", False, 201088, 2880, "norm"),
    Shape("qwen3-30b-a3b", "qkv", True, 5120, 2048, "join"),
    Shape("qwen3-30b-a3b", "o", True, 2048, 4096),
    Shape("llama-3.1-8b", "qkv", True, 6144, 4096, "join"),
    Shape("llama-3.1-8b", "o", True, 4096, 4096),
    Shape("llama-3.1-8b", "gate_up", True, 28672, 4096, "join", "silu"),
    Shape("llama-3.1-8b", "down", True, 4096, 14336),
]


def by(found: Variant) -> Projection:
    """The streaming kernel of this variant."""

    def projection(
        x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, act: str, prologue: Prologue | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if x.shape[0] == 1:
            made = stream(x, weight, bias, act, prologue, found)
            assert made is not None
            return made
        assert isinstance(weight, torch.Tensor | Fp8Weight)
        given, joined = (Rows(x), None) if found.quantize else prepared(x, weight, prologue)
        y = stream_rows(given, weight, bias, act, found)
        assert y is not None
        return y, joined

    return projection


def ways(shape: Shape, rows: int) -> Iterator[tuple[str, Projection]]:
    """Triton's kernels, what is taken now, and every variant."""
    yield "triton", project
    yield "now", stream_or_project
    for found in shape.variants(rows):
        yield named(found), by(found)


def named(found: Variant) -> str:
    """Warps x bytes of a segment x most stages, programs of a cluster, how rows of e4m3 are held."""
    held = (" as float16" if found.wide else " as e4m3") if found.narrow and found.rows > 1 else ""
    held += (" quantised inside" if found.quantize else "") + (" alone" if found.programs == 1 else "")
    return f"{found.warps}x{found.segment}x{found.stages}{f' by {found.cluster}' if found.cluster > 1 else ''}{held}"


def cases(shape: Shape, rows: int, weights: Sequence[Multiplied]) -> Iterator[Case]:
    """A projection by each way; the weights take turns."""
    x, bias, prologue = shape.entering(rows)
    for name, projection in ways(shape, rows):

        def make(copies: int, projection: Projection = projection) -> list[Launch]:
            return [partial(projection, x, weight, bias, shape.act, prologue) for weight in weights]

        title = f"{shape.model} {'fp8' if shape.fp8 else 'bf16'} {shape.name} B{rows} {name}"
        yield Case(title, shape.n * shape.k * (1 if shape.fp8 else 2), 2 * rows * shape.n * shape.k, make)


def check(shapes: Sequence[Shape], counts: Sequence[int]) -> bool:
    """Each variant of each shape against float64."""
    good = True
    for shape in shapes:
        weight = matrix(CHECKED_OUTPUTS * (1 if shape.act == "none" else 2), shape.k, shape.fp8)
        for count in counts:
            for found in shape.variants(count):
                for entering in {count, max(count - 1, count // 2 + 1)}:
                    projection = by(replace(found, bias=True))
                    inside = bool(found.quantize)
                    good &= same(weight, shape.act, shape.prologue, entering, projection, named(found), inside)
    return good


def _compile(chosen: tuple[Variant, str]) -> None:
    found, name = chosen
    compiled(found.source, found.defines(), name)


def compile_all(shapes: Sequence[Shape], counts: Sequence[int], checked: bool, jobs: int) -> None:
    """Into the cache, so that later ones find them."""
    device, wanted = 0, set()
    for shape in shapes:
        n = shape.n if shape.act == "none" else shape.n // 2
        for found in (each for count in counts for each in shape.variants(count)):
            launched = [(found, n), (replace(found, bias=True), CHECKED_OUTPUTS)]
            for variant, outputs in launched[: 1 + checked]:
                wanted.add((for_outputs(variant, outputs, processors(device))[0], architecture(device)))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, wanted, chunksize=4))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile in parallel, check where asked, time one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=sorted({shape.model for shape in SHAPES}))
    parser.add_argument("--only", nargs="*", default=["qkv", "o", "head", "gate_up", "down"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8], help=f"of x, up to {MOST_ROWS}")
    parser.add_argument("--check", action="store_true", help="compare with float64 first")
    parser.add_argument("--no-times", action="store_true", help="time nothing")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    options = parser.parse_args(arguments)
    shapes = [shape for shape in SHAPES if shape.model in options.model and shape.name in options.only]
    compile_all(shapes, options.rows, options.check, options.jobs)
    good = not options.check or check(shapes, options.rows)
    for shape in () if options.no_times else shapes:
        copies = max(2, -(-ROTATED_BYTES // (shape.n * shape.k * (1 if shape.fp8 else 2))))
        weights = [matrix(shape.n, shape.k, shape.fp8) for _ in range(copies)]
        for rows in options.rows:
            timed = [(microseconds(case), case) for case in cases(shape, rows, weights)]
            for us, case in [*timed[:2], *sorted(timed[2:], key=lambda each: each[0])]:
                print(f"{us:9.2f} us, floor {case.bytes / CEILING_GBS / 1e3:7.2f}  {case.name}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
