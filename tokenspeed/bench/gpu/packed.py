"""Projections by int8, int4 and MXFP4 weights: checks them, or times a layer's.

    python -m tokenspeed.bench.gpu.packed --check
    python -m tokenspeed.bench.gpu.packed [--model 8b] [--format int4] [--rows 1 8 32] [--out FILE]

--check compares each type with float64 of the values it stands for, on fresh random data over poisoned memory: 1 to 8,
16, 33, 64, 100 and 300 rows, by the streaming kernel where it takes them and by Triton's. Status 1 where one is wrong.
Times are of layers of distinct weights in one graph, joins and norms included, without attention.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tokenspeed.bench.gpu.chain import SHAPES, Layer, Projection, microseconds, ready, streamed
from tokenspeed.bench.gpu.graph_timing import write_timed
from tokenspeed.kernels.cuda.registration import stream_or_project
from tokenspeed.kernels.cuda.stream import stream
from tokenspeed.kernels.triton.linear import project
from tokenspeed.kernels.triton.operands import Matrix, Norm, Prologue
from tokenspeed.quantization.groups import GPU_MODES
from tokenspeed.quantization.int4 import int4_weight
from tokenspeed.quantization.narrow import NarrowWeight, narrow

OF_FILES: dict[str, tuple[torch.dtype, int, bool]] = {
    "int4 zeros": (torch.bfloat16, 128, True),
    "int4 half": (torch.float16, 128, False),
    "int4 64": (torch.bfloat16, 64, False),
    "int4 32 zeros": (torch.float16, 32, True),
}
"""int4 as checkpoints have it: type of scales, columns of a group, whether there are zero points."""
NOT_STREAMED = [kind for kind in OF_FILES if kind != "int4 half"]
KINDS = ("int8", "int4", *OF_FILES, "mxfp4")
ROWS = (*range(1, 9), 16, 33, 64, 100, 300)
SIZES = ((24, 128), (1002, 2048), (66, 1024), (256, 4096), (44, 14336), (70, 5120), (36, 640))
"""Rows of W, some that leave units and tiles ragged, and columns."""
PROLOGUES = ("bare", "norm", "join", "branch norm")
ACTS = ("none", "silu", "gelu_tanh")
POISON_BYTES = 64 << 20
BOUND, GATED_BOUND = 0.02, 0.05
"""Of |y - exact| / (1 + |exact|), with weights rounded to bf16 beyond 64 rows; products of gate and up carry the errors
of both."""


class Case(NamedTuple):
    """A projection to check. streamed: by the streaming kernel, else by Triton's."""

    kind: str
    rows: int
    stored: int
    columns: int
    act: str
    prologue: str
    streamed: bool


def cases(kinds: Sequence[str] = KINDS) -> list[Case]:
    """Every type with every number of rows and size; prologues and activations in turn, all of them for one row."""
    made = []
    for kind in kinds:
        for stored, columns in SIZES:
            for i, rows in enumerate(ROWS):
                act = ACTS[i % 3] if stored % 4 == 0 else "none"
                made.append(
                    Case(kind, rows, stored, columns, act, PROLOGUES[i % 4 if columns <= 8192 else i % 2], False)
                )
            for act in ACTS if stored % 4 == 0 else ("none",):
                for prologue in PROLOGUES if columns <= 8192 else PROLOGUES[:1]:
                    made.append(Case(kind, 1, stored, columns, act, prologue, True))
    return made


def weight_of(kind: str, rows: int, columns: int, device: str = "cuda") -> Matrix:
    """Random, of unit-scale products, rows of different size."""
    if kind in OF_FILES:
        scale_type, group, zeros = OF_FILES[kind]
        codes, groups = torch.randint(0, 16, (rows, columns), device=device), (rows, columns // group)
        scale = ((torch.rand(*groups, device=device) + 0.2) * columns**-0.5 / 4).to(scale_type)
        return int4_weight(codes, scale, torch.randint(0, 16, groups, device=device) if zeros else None)
    sizes = columns**-0.5 * (0.5 + torch.rand(rows, 1, device=device))
    weight = (torch.randn(rows, columns, device=device) * sizes).bfloat16()
    if kind == "bf16":
        return weight
    made = narrow(weight, kind, "random")
    assert isinstance(made, NarrowWeight)
    return made


def wrong(case: Case, device: str = "cuda") -> str | None:
    """What is wrong with the outcome of a case, or None."""
    weight = weight_of(case.kind, case.stored, case.columns, device)
    assert not isinstance(weight, torch.Tensor)
    x, branch = (torch.randn(2, case.rows, case.columns, device=device) + 0.3).bfloat16()
    norms = [Norm(torch.rand(case.columns, device=device) + 0.5, 1e-5) for _ in range(2)]
    prologue = None
    if case.prologue != "bare":
        joined = None if case.prologue == "norm" else branch
        prologue = Prologue(norms[0], joined, norms[1] if case.prologue == "branch norm" else None)
    bias = torch.randn(case.stored, device=device)
    poison = torch.full((POISON_BYTES // 4,), float("nan"), device=device)
    del poison
    made = (stream if case.streamed else project)(x, weight, bias, case.act, prologue)
    if made is None:
        return None if case.columns % 1024 or case.kind in NOT_STREAMED else "the streaming kernel does not take it"
    y, total = made
    entered, wanted_total = ready(x, prologue)
    product = entered.double() @ weight.dequantized(torch.float64).T + bias.bfloat16().double()
    if case.act != "none":
        gate, up = product.bfloat16().double().chunk(2, dim=1)
        opened = torch.nn.functional.silu(gate) if case.act == "silu" else _gelu(gate)
        product = opened.bfloat16().double() * up
    error = float(((y.double() - product).abs() / (1 + product.abs())).nan_to_num(9e9).max())
    if error >= (BOUND if case.act == "none" else GATED_BOUND):
        return f"off by {error:.4f}"
    same = total is None or torch.allclose(total.float(), wanted_total.float(), rtol=2**-7, atol=2**-6)
    return None if same else "the joined rows differ"


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def check(kinds: Sequence[str]) -> bool:
    """All cases of some types; prints what is wrong, and how many of each are right."""
    good = True
    for kind in kinds:
        found = [(case, wrong(case)) for case in cases([kind])]
        for case, error in found:
            if error is not None:
                print(f"WRONG  {case}: {error}", flush=True)
        right = sum(error is None for _, error in found)
        good &= right == len(found)
        print(f"{kind}: {right} of {len(found)} right", flush=True)
    return good


def layers(model: str, kind: str) -> list[Layer]:
    """Weights of some layers, of more bytes in all than the second-level cache holds."""
    hidden, qkv, ff, count = SHAPES[model]
    sizes = {"qkv": (qkv, hidden), "o": (hidden, hidden), "gate_up": (2 * ff, hidden), "down": (hidden, ff)}
    return [{name: weight_of(kind, *size) for name, size in sizes.items()} for _ in range(count)]


def timed(model: str, kind: str, rows: int, out: list[tuple[str, int, float]]) -> None:
    """Print the time of a layer, by each way that takes so many rows."""
    made = layers(model, kind)
    moved = sum(weight.nbytes for weight in made[0].values())
    streaming: Projection = streamed if kind not in NOT_STREAMED else stream_or_project
    ways: dict[str, Projection] = {"triton": project} | ({"streamed": streaming} if rows == 1 else {})
    for name, projection in ways.items():
        us = microseconds(made, projection, rows)
        out.append((f"{model} {kind} B{rows} {name}", moved, us))
        print(f"{model} {kind} B{rows} {name}: {us:.2f} us a layer, {moved / us / 1e3:.0f} GB/s", flush=True)


def main() -> int:
    """Check, or time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--model", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--format", nargs="*", choices=("bf16", *GPU_MODES, *OF_FILES), default=["int8", "int4", "mxfp4"]
    )
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--out", type=Path, metavar="FILE", help="of records to add to")
    options = parser.parse_args()
    if options.check:
        return 0 if check(KINDS) else 1
    times: list[tuple[str, int, float]] = []
    for model in options.model:
        for kind in options.format:
            for rows in options.rows:
                timed(model, kind, rows, times)
    if options.out is not None:
        write_timed(options.out, "packed", times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
