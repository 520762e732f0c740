"""A layer's experts, as their kernels are given them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.kernels.triton.operands import Multiplied
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts

ACTS = ("silu", "gelu_tanh", "swiglu_clamped")
ExpertMatrix = Multiplied | Mxfp4Experts
"""[experts, N, K]."""


@dataclass(frozen=True)
class Experts:
    """gate_up [experts, 2 ff, hidden], gates first, and down [experts, hidden, ff], in one format: the compute dtype,
    e4m3 or MXFP4; biases float32 [experts, 2 ff] and [experts, hidden] or None. act: one of ACTS; alpha, limit: of
    swiglu_clamped."""

    gate_up: ExpertMatrix
    down: ExpertMatrix
    act: str
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    alpha: float = 0.0
    limit: float = 0.0

    @property
    def number(self) -> int:
        return self.gate_up.shape[0]
