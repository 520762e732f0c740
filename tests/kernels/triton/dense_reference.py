"""float64 references of the dense kernels, rounded to the compute dtype where the torch references round."""

from __future__ import annotations

import torch

from tokenspeed.kernels.triton.operands import Matrix, Norm, Prologue
from tokenspeed.quantization.fp8 import Fp8Weight, quantize_rows


def random_norm(cols: int, generator: torch.Generator) -> Norm:
    return Norm(1 + 0.3 * torch.randn(cols, generator=generator), 1e-5)


def random_prologue(kind: str, rows: int, cols: int, dtype: torch.dtype, generator: torch.Generator) -> Prologue | None:
    if kind == "none":
        return None
    norm = random_norm(cols, generator)
    if kind == "norm":
        return Prologue(norm)
    branch = (3 * torch.randn(rows, cols, generator=generator)).to(dtype)
    return Prologue(norm, branch, random_norm(cols, generator) if kind == "branch" else None)


def normed(x: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    factor = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + norm.eps)
    return (x.double() * factor * norm.weight.double()).to(dtype)


def prepared(x: torch.Tensor, prologue: Prologue | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x joined and normed, in its dtype, and the sum."""
    if prologue is None:
        return x, None
    joined = None
    if prologue.branch is not None:
        branch = prologue.branch
        if prologue.branch_norm is not None:
            branch = normed(branch, prologue.branch_norm, x.dtype)
        x = joined = (x.double() + branch.double()).to(x.dtype)
    return normed(x, prologue.norm, x.dtype), joined


def activated(y: torch.Tensor, act: str, dtype: torch.dtype) -> torch.Tensor:
    """float64 of act(left half) * right half, after the roundings that come before it."""
    if act == "none":
        return y
    gate, up = (half.to(dtype).double() for half in y.chunk(2, -1))
    tanh = torch.nn.functional.gelu(gate, approximate="tanh")
    opened = torch.nn.functional.silu(gate) if act == "silu" else tanh
    return opened.to(dtype).double() * up


def projected(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, act: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T with bias and activation in float64, and the tolerance of each element.

    Rounding the result costs half a step of its dtype. Sums in float32, and single inputs that a norm in float32 rounds
    to the neighbour, cost as much as a few products' worth of steps: the root of the sum of squared products, times 4,
    or 24 where float32 is the dtype too. A neighbour in e4m3 is 2^-4 away, and a few of 200 may be.
    """
    dtype = x.dtype
    step = torch.finfo(dtype).eps / 2
    matrix = weight.double() if isinstance(weight, torch.Tensor) else weight.dequantized(torch.float64)
    wide, steps = x.double(), (24 if dtype == torch.float32 else 4) * step
    if isinstance(weight, Fp8Weight):
        q, scale = quantize_rows(x)
        wide, steps = q.double() * scale.double()[:, None], steps + 2**-6
    y = wide @ matrix.T
    spread = (wide.square() @ matrix.square().T).sqrt() * steps
    if bias is not None:
        y = y + bias.to(dtype).double()
    tolerance = y.abs() * step * 1.01 + spread
    if act == "none":
        return y, tolerance
    out = activated(y, act, dtype)
    gate, up = y.chunk(2, -1)
    gate_tolerance, up_tolerance = tolerance.chunk(2, -1)
    return out, 1.2 * (gate_tolerance * up.abs() + up_tolerance * gate.abs()) + 3 * step * out.abs() + 1e-9
