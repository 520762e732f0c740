"""A layer's projections as a decode step chains them: `python -m tokenspeed.bench.gpu.chain --model 8b --rows 1 8 32`.

Compares the CUDA kernels with float64 first, over outputs poisoned before, then times layers of distinct weights
in one graph: without attention, norms and joins included. Ends with status 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from statistics import median

import torch

from tokenspeed.bench.gpu.expert_cases import poisoned
from tokenspeed.kernels.cuda.dense_tall import MOST_TOKENS
from tokenspeed.kernels.cuda.registration import stream_or_project, tall_or_project
from tokenspeed.kernels.cuda.stream import stream
from tokenspeed.kernels.cuda.stream_tiles import MOST_ROWS
from tokenspeed.kernels.triton.linear import prepared, project
from tokenspeed.kernels.triton.operands import Matrix, Multiplied, Norm, Prologue, matrix_parts
from tokenspeed.quantization.fp8 import Fp8Weight, quantize_fp8

SHAPES = {"1b": (2048, 3072, 8192, 12), "8b": (4096, 6144, 14336, 6)}
"""Hidden size, rows of q, k and v, of up; layers timed."""
REPEATS, REPLAYS = 4, 9
Projection = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Layer = dict[str, Matrix]


def streamed(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, act: str, prologue: Prologue | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The streaming kernel, which must take one row; more where they fit beside it, many by warpgroup products."""
    if x.shape[0] > MOST_ROWS:
        return tall_or_project(x, weight, bias, act, prologue)
    if x.shape[0] > 1:
        return stream_or_project(x, weight, bias, act, prologue)
    found = stream(x, weight, bias, act, prologue)
    assert found is not None, f"no variant for {tuple(weight.shape)}"
    return found


def matrix(rows: int, columns: int, narrow: bool) -> Multiplied:
    """Random, of unit-scale products."""
    weight = (torch.randn(rows, columns, device="cuda") * columns**-0.5).bfloat16()
    return quantize_fp8(weight) if narrow else weight


def layers(model: str, narrow: bool) -> list[Layer]:
    """Weights of some layers."""
    hidden, qkv, ff, count = SHAPES[model]
    sizes = {"qkv": (qkv, hidden), "o": (hidden, hidden), "gate_up": (2 * ff, hidden), "down": (hidden, ff)}
    return [{name: matrix(*size, narrow) for name, size in sizes.items()} for _ in range(count)]


def run(made: list[Layer], projection: Projection, norm: Norm, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """All layers; what attention would give is taken from q."""
    for layer in made:
        qkv, joined = projection(x, layer["qkv"], None, "none", Prologue(norm, branch))
        assert joined is not None
        out, _ = projection(qkv[:, : x.shape[1]], layer["o"], None, "none", None)
        hidden, joined = projection(joined, layer["gate_up"], None, "silu", Prologue(norm, out))
        assert joined is not None
        x = joined
        branch, _ = projection(hidden, layer["down"], None, "none", None)
    return branch


def microseconds(made: list[Layer], projection: Projection, rows: int) -> float:
    """Of one layer with so many rows, the median over replays."""
    columns = made[0]["o"].shape[0]
    norm = Norm(torch.ones(columns, device="cuda"), 1e-5)
    x, branch = torch.randn(2, rows, columns, device="cuda").bfloat16()
    run(made, projection, norm, x, branch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run(made, projection, norm, x, branch)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / REPEATS / len(made))
    return median(times[1:])


def check(narrow: bool, entering: Sequence[int]) -> bool:
    """Against float64 of the same rounded operands, every prologue and activation, sizes with a ragged last unit."""
    good = True
    for rows, columns in ((24, 4096), (1001 * 2, 2048), (4096, 14336), (6144, 4096), (66, 8192), (176, 1040)):
        for act in ("none", "silu", "gelu_tanh"):
            for kind in ("bare", "norm", "join", "branch norm"):
                for count in entering:
                    if _taken(columns, act, kind, count):
                        good &= same(matrix(rows, columns, narrow), act, kind, count, streamed)
    return good


def _taken(columns: int, act: str, kind: str, entering: int) -> bool:
    if entering > MOST_ROWS:
        return act == "none"  # Triton's kernel has the others
    return entering > 1 or (columns % 1024 == 0 and (columns <= 8192 or kind == "bare"))


def same(
    weight: Multiplied,
    act: str,
    kind: str,
    entering: int,
    projection: Projection,
    name: str = "",
    inside: bool = False,
) -> bool:
    """Whether a projection's result is right for so many random rows with a prologue of some kind, which it prints.
    inside: the kernel itself prepares several rows, as it does one."""
    rows, columns = weight.shape
    x, branch = torch.randn(2, entering, columns, device="cuda").bfloat16()
    norms = [Norm(torch.rand(columns, device="cuda") + 0.5, 1e-5) for _ in range(2)]
    prologue = None if kind == "bare" else Prologue(norms[0], None if kind == "norm" else branch,
                                                    norms[1] if kind == "branch norm" else None)  # fmt: skip
    bias = torch.randn(rows, device="cuda")
    with poisoned():
        y, joined = projection(x, weight, bias, act, prologue)
    entered, total = _entered(x, weight, prologue, inside or entering == 1)
    values, scales = matrix_parts(weight)
    exact = values.double() * (1 if scales is None else scales.double()[:, None])
    product = entered @ exact.T + bias.bfloat16().double()
    if act != "none":
        gate, up = product.bfloat16().double().chunk(2, dim=1)
        opened = torch.nn.functional.silu(gate) if act == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
        product = opened * up
    worst = float(((y.double() - product).abs() / (1 + product.abs())).nan_to_num(9e9).max())
    # The last bit of a norm may move the row's largest value, and with it the rounding of all others to e4m3.
    bound = 0.06 if isinstance(weight, Fp8Weight) and prologue is not None and entering == 1 else 0.02
    # The same bit may move a sum with a branch that was normed.
    apart = 2**-7 if kind == "branch norm" else 0.0
    good = worst < bound and (joined is None or torch.allclose(joined, total, rtol=apart, atol=apart))
    said = f"{entering} by [{rows}, {columns}] {act} {kind} {name}"
    print(f"{'ok' if good else 'WRONG':6} {worst:.5f}  {said}", flush=True)
    return good


def _entered(
    x: torch.Tensor, weight: Multiplied, prologue: Prologue | None, inside: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is multiplied, float64, and the joined rows: as the streaming kernel should prepare them, or as Triton's
    kernel does. Triton's division may be a last bit off, and many values of bf16 lie midway between two of e4m3."""
    if not inside:
        given, joined = prepared(x, weight, prologue)
        scales = 1 if given.scale is None else given.scale.double()[:, None]
        return given.values.double() * scales, x if joined is None else joined
    entered, total = ready(x, prologue)
    if not isinstance(weight, Fp8Weight):
        return entered.double(), total
    scale = entered.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.full((), 448.0, device="cuda")
    return (entered * (1 / scale)).to(torch.float8_e4m3fn).double() * scale.double(), total


def ready(x: torch.Tensor, prologue: Prologue | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the product takes, float32 of values rounded to bf16, and the joined rows."""
    if prologue is None:
        return x.float(), x
    total = x
    if prologue.branch is not None:
        branch = prologue.branch
        total = x + (_normed(branch, prologue.branch_norm) if prologue.branch_norm else branch)
    return _normed(total, prologue.norm).float(), total


def _normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight).to(x.dtype)


def main() -> int:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="8b")
    parser.add_argument("--format", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help=f"of x, up to {MOST_TOKENS}")
    parser.add_argument("--no-check", action="store_true", help="only time")
    options = parser.parse_args()
    narrow = options.format == "fp8"
    if not options.no_check and not check(narrow, options.rows):
        return 1
    made = layers(options.model, narrow)
    moved = sum(w.nbytes for w in made[0].values())
    compared = (("triton", project), ("cuda", streamed)) * 2
    for rows in options.rows:
        for name, projection in compared:
            us = microseconds(made, projection, rows)
            what = f"{options.model} {options.format} {rows} rows {name}"
            print(f"{what}: {us:.2f} us a layer, {moved / us / 1e6:.3f} TB/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
