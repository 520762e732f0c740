"""fp8 weights: e4m3 values (arXiv:2209.05433) with float32 scales, made once when a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tokenspeed.contracts.errors import UnsupportedError

FORMAT = "F8_E4M3"
"""Name of the stored format, as safetensors has it."""
FP8_MAX = 448.0
BLOCK = 128
TINY = 1e-12
Granularity = Literal["channel", "tensor", "block"]


@dataclass(frozen=True)
class Fp8Weight:
    """q: float8_e4m3fn [N, K]. scale: float32 [N], or [ceil(N/128), ceil(K/128)]; the value is q times its scale. Of
    experts, one matrix after the other, both have a first axis more."""

    q: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        *experts, rows, cols = self.q.shape
        allowed = ((*experts, rows), (*experts, -(-rows // BLOCK), -(-cols // BLOCK)))
        if self.q.dtype != torch.float8_e4m3fn or tuple(self.scale.shape) not in allowed:
            raise UnsupportedError(
                f"fp8 weight {self.q.dtype} {tuple(self.q.shape)} with scales {tuple(self.scale.shape)} "
                f"(supported: torch.float8_e4m3fn with scales {allowed[0]} or {allowed[1]})"
            )

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes

    @property
    def scale_block(self) -> int:
        """Rows and columns that share a scale; 0 where each row has its own."""
        return BLOCK if self.scale.dim() == self.q.dim() else 0

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """q * scale, computed in float32: the shape of q, of `dtype`."""
        if not self.scale_block:
            return (self.q.float() * self.scale[..., None]).to(dtype)
        rows, cols = self.q.shape[-2:]
        wide = self.scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :cols]
        return (self.q.float() * wide).to(dtype)


def quantize_fp8(weight: torch.Tensor, granularity: Granularity = "channel") -> Fp8Weight:
    """Weights [N, K], or of experts [E, N, K], of any float dtype to e4m3, scale = absmax / 448 of each row, 128x128
    block, or the whole matrix.

    One scale for the whole is kept as N equal ones. Works on any device in float32, a few million elements at a time.
    """
    if weight.dim() == 3:
        return _quantize_experts(weight, granularity)
    rows, _ = weight.shape
    if granularity == "block":
        return _quantize_blocks(weight)
    largest = torch.cat([part.float().abs().amax(1) for part in _parts(weight)])
    if granularity == "tensor":
        largest = largest.amax().expand(rows)
    scale = (largest.clamp_min(TINY) / FP8_MAX).contiguous()
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    start = 0
    for part in _parts(weight):
        end = start + part.shape[0]
        q[start:end] = _cast(part.float() / scale[start:end, None])
        start = end
    return Fp8Weight(q, scale)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [T, K] to e4m3 [T, K] with a float32 scale [T] per row: the reference of what kernels do."""
    scale = x.float().abs().amax(-1).clamp_min(TINY) / FP8_MAX
    return _cast(x.float() * (1.0 / scale)[:, None]), scale


def _quantize_experts(weight: torch.Tensor, granularity: Granularity) -> Fp8Weight:
    if granularity == "channel":
        flat = quantize_fp8(weight.flatten(0, 1))
        return Fp8Weight(flat.q.view(weight.shape), flat.scale.view(weight.shape[:2]))
    each = [quantize_fp8(matrix, granularity) for matrix in weight]
    return Fp8Weight(torch.stack([one.q for one in each]), torch.stack([one.scale for one in each]))


def _quantize_blocks(weight: torch.Tensor) -> Fp8Weight:
    rows, cols = weight.shape
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = []
    for start in range(0, rows, BLOCK):
        part = weight[start : start + BLOCK].float()
        columns = torch.nn.functional.pad(part.abs().amax(0), (0, -cols % BLOCK))
        scale = columns.view(-1, BLOCK).amax(1).clamp_min(TINY) / FP8_MAX
        q[start : start + BLOCK] = _cast(part / scale.repeat_interleave(BLOCK)[:cols])
        scales.append(scale)
    return Fp8Weight(q, torch.stack(scales))


def _cast(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _parts(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.split(max(1, (1 << 24) // weight.shape[1]))
