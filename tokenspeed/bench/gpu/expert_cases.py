"""Random experts for checks of their kernels, what they give in float64, and memory that shows what nobody wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from tokenspeed.kernels.triton.expert_operands import ExpertMatrix, Experts
from tokenspeed.quantization.fp8 import Fp8Weight, Granularity, quantize_fp8, quantize_rows
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts, quantize_experts

ALPHA, LIMIT = 1.702, 0.8
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Of a row's norm: what is rounded on the way. Seen: 0.004 in bf16."""
FP8_TOLERANCE = 5e-2
"""The same by e4m3 weights, where float32 and float64 may put a value on different sides of a step of e4m3. Seen:
0.003 without such a value."""


Asked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x, ids and shares."""


@dataclass(frozen=True)
class ExpertCase:
    """A layer's experts. fmt: "plain", "mxfp4", or the granularity of e4m3 weights, "channel" or "block"."""

    experts: int
    k: int
    hidden: int
    ff: int
    act: str = "silu"
    biased: bool = False
    fmt: str = "plain"
    dtype: torch.dtype = torch.bfloat16

    @property
    def tolerance(self) -> float:
        """Of the norm of a row's error, by the row's own."""
        return TOLERANCE[self.dtype] if self.fmt in ("plain", "mxfp4") else max(FP8_TOLERANCE, TOLERANCE[self.dtype])

    @property
    def plain_tolerance(self) -> float:
        """The same where x is not rounded to e4m3."""
        return TOLERANCE[self.dtype]

    def random(self, g: torch.Generator) -> Experts:
        """Weights whose rows differ in size, on the generator's device."""
        up_bias, down_bias = (_normal(g, self.experts, n) for n in (2 * self.ff, self.hidden))
        gate_up, down = self._matrix(g, 2 * self.ff, self.hidden), self._matrix(g, self.hidden, self.ff)
        plain = Experts(gate_up, down, self.act, alpha=ALPHA, limit=LIMIT)
        return replace(plain, gate_up_bias=up_bias, down_bias=down_bias) if self.biased else plain

    def _matrix(self, g: torch.Generator, rows: int, cols: int) -> ExpertMatrix:
        sizes = torch.rand(self.experts, rows, 1, generator=g, device=g.device) + 0.1
        values = (_normal(g, self.experts, rows, cols) * sizes / cols**0.5).to(self.dtype)
        if self.fmt == "mxfp4":
            return quantize_experts(values)
        granularity: Granularity = "block" if self.fmt == "block" else "channel"
        return values if self.fmt == "plain" else quantize_fp8(values, granularity)

    def choices(self, tokens: int, g: torch.Generator, padding: int = 0) -> Asked:
        """x, ids and shares of tokens, the last `padding` of which choose nobody; some experts are chosen far more
        often than others. x is a slice of wider rows."""
        x = (2 * _normal(g, tokens, self.hidden + 8)).to(self.dtype)[:, 8:]
        favour = torch.rand(self.experts, generator=g, device=g.device).pow(3) + 1e-3
        ids = torch.multinomial(favour.expand(tokens, -1), self.k, generator=g).int()
        if padding:
            ids[-padding:] = -1
        return x, ids, torch.rand(tokens, self.k, generator=g, device=g.device) + 0.1


def _normal(g: torch.Generator, *size: int) -> torch.Tensor:
    return torch.randn(size, generator=g, device=g.device)


def exact(
    x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, given: Experts, rounds: bool = True
) -> torch.Tensor:
    """[T, hidden] in float64, rounded to the dtype of x, and to e4m3 if `rounds`, where the kernels round."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(given.number):
        rows, places = (ids == expert).nonzero(as_tuple=True)
        between = _product(x[rows], given.gate_up, given.gate_up_bias, expert, rounds)
        y = _product(activated(between.to(x.dtype), given), given.down, given.down_bias, expert, rounds)
        out.index_add_(0, rows, y * shares[rows, places, None])
    return out


def _product(
    x: torch.Tensor, weight: ExpertMatrix, bias: torch.Tensor | None, expert: int, rounds: bool
) -> torch.Tensor:
    if isinstance(weight, Fp8Weight):
        q, scale = quantize_rows(x)
        wide, matrix = q.double() * scale.double()[:, None], Fp8Weight(weight.q[expert], weight.scale[expert])
        wide = wide if rounds else x.double()
        y = wide @ matrix.dequantized(torch.float64).T
    elif isinstance(weight, Mxfp4Experts):
        one = Mxfp4Experts(weight.q[expert, None], weight.scale[expert, None], weight.cols)
        y = x.double() @ one.dequantized(torch.float64)[0].T
    else:
        y = x.double() @ weight[expert].double().T
    return y if bias is None else y + bias[expert].to(x.dtype).double()


def activated(both: torch.Tensor, given: Experts) -> torch.Tensor:
    """What goes down, of gates beside ups; each rounded to their dtype, and computed in float64."""
    gate, up = both.double().chunk(2, -1)
    if given.act == "swiglu_clamped":
        gate, up = gate.clamp(max=given.limit), up.clamp(-given.limit, given.limit)
        return (gate * torch.sigmoid(given.alpha * gate) * (up + 1)).to(both.dtype)
    opened = F.silu(gate) if given.act == "silu" else F.gelu(gate, approximate="tanh")
    return (opened.to(both.dtype).double() * up).to(both.dtype)


def worst_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest norm of a row's error, by the row's own; infinite where a row that has to be zeros is not."""
    error, size = (got.double() - wanted).norm(dim=1), wanted.norm(dim=1)
    return float(torch.where(error == 0, 0.0, error / size).max())


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, what `torch.empty` gives is full of NaN, or of the greatest integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
