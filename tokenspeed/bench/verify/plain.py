"""Records of a program by the references of their plain ops, in any float type, weights unpacked as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tokenspeed.bench.verify.weights import Values
from tokenspeed.ops.reference import REFERENCE, StepView, wide
from tokenspeed.program.program import Record
from tokenspeed.quantization.fp8 import quantize_rows

Tensors = dict[int, torch.Tensor]


@dataclass(frozen=True)
class PlainOps:
    """dtype: of all activations; weights are rounded to it. rounds: whether rows are rounded to e4m3 in front of
    weights for which kernels may do that."""

    weights: Values
    dtype: torch.dtype
    rounds: bool = False

    def run(self, record: Record, view: StepView, values: Tensors) -> None:
        """Add the outputs of a record, and those inside it, to values by number."""
        for part in record.plain():
            inputs = [values[v] for v in part.inputs]
            values.update(zip(part.outputs, self._part(part, view, inputs), strict=True))

    def _part(self, part: Record, view: StepView, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if part.op == "linear":
            return (self._linear(part, inputs[0]),)
        if part.op == "embed":
            ids = inputs[0]
            found, at = ids.unique(return_inverse=True)
            return REFERENCE["embed"](view, [at], [self.weights.some(part.weights[0], found, self.dtype)], part.attrs)
        if part.op == "experts":
            return self._experts(part, view, inputs)
        return REFERENCE[part.op](view, inputs, [self.weights.vector(name) for name in part.weights], part.attrs)

    def _linear(self, part: Record, x: torch.Tensor) -> torch.Tensor:
        name, *bias = part.weights
        x = self._entering(name, x)
        y = torch.cat([F.linear(x, piece) for piece in self.weights.pieces(name, self.dtype)], -1)
        return y + self.weights.vector(bias[0]).to(self.dtype) if bias else y

    def _experts(self, part: Record, view: StepView, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """By the reference, with the weights of the experts that were chosen, renumbered."""
        x, ids, shares = inputs
        chosen, at = ids.unique(return_inverse=True)
        out = torch.zeros(x.shape, dtype=wide(x[:0]).dtype, device=x.device)
        for place, expert in enumerate(chosen.tolist()):
            weights = [self.weights.expert(name, expert, self.dtype)[None] for name in part.weights]
            of_others = at != place
            mine = shares.masked_fill(of_others, 0).sum(-1, keepdim=True).to(shares.dtype)
            rows = (~of_others).any(-1)
            first = torch.zeros(int(rows.sum()), 1, dtype=ids.dtype, device=ids.device)
            rounded = self._entering(part.weights[0], x[rows])
            out[rows] += REFERENCE["experts"](view, [rounded, first, mine[rows]], weights, part.attrs)[0]
        return (out.to(x.dtype),)

    def _entering(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if not (self.rounds and self.weights.rounds_rows(name)):
            return x
        codes, scale = quantize_rows(x)
        return (codes.to(self.dtype) * scale[:, None].to(self.dtype)).to(self.dtype)
