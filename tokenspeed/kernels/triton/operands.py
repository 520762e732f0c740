"""What the dense kernels are given: norms, prologues of a projection, rows that may be quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.narrow import NarrowWeight

Multiplied = torch.Tensor | Fp8Weight
"""[N, K] in the compute dtype, or e4m3 with scales: what products take as it is."""
Matrix = torch.Tensor | NarrowWeight
"""[N, K], plain or narrow."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm: weight float32 [K], eps."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Rows:
    """Rows [T, K] in the compute dtype, or in e4m3 with a float32 scale [T] each."""

    values: torch.Tensor
    scale: torch.Tensor | None = None


@dataclass(frozen=True)
class Prologue:
    """What is done to x before a projection: join with a branch, itself normed or not, then norm."""

    norm: Norm
    branch: torch.Tensor | None = None
    branch_norm: Norm | None = None


def matrix_parts(weight: Multiplied) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values, and scales where there are any."""
    return (weight.q, weight.scale) if isinstance(weight, Fp8Weight) else (weight, None)


def scale_block_of(weight: Multiplied) -> int:
    """Rows and columns that share a scale; 0 where each row has its own, or none."""
    return weight.scale_block if isinstance(weight, Fp8Weight) else 0


def check_matrix(weight: Matrix, cols: int) -> None:
    """Raise UnsupportedError for a weight that rows of `cols` columns cannot be multiplied with."""
    matrix = weight.q if isinstance(weight, NarrowWeight) else weight
    if weight.shape[1] != cols or matrix.stride(1) != 1:
        raise UnsupportedError(
            f"projection of {cols} columns by a weight {tuple(weight.shape)} of strides {matrix.stride()} "
            f"(supported: [N, {cols}] with contiguous rows)"
        )
