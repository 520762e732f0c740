"""What the dense kernels are given: norms, prologues of a projection, rows that may be quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.quantization.fp8 import Fp8Weight

Matrix = torch.Tensor | Fp8Weight
"""[N, K] in the compute dtype, or e4m3 with scales."""


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
