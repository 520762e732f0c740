"""int8 weights: symmetric codes with a float32 scale per output channel; activations keep their type."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.quantization.parts import finite, inverse, parts

FORMAT = "I8"
"""Name of the stored format, as safetensors has it."""
LARGEST = 127


@dataclass(frozen=True)
class Int8Weight:
    """q: int8 [N, K], row after row. scale: float32 [N]; the value is q times its row's scale."""

    q: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        if self.q.dtype != torch.int8 or self.scale.dtype != torch.float32 or self.scale.shape != self.q.shape[:1]:
            raise UnsupportedError(
                f"int8 weight {self.q.dtype} {tuple(self.q.shape)} with scales {self.scale.dtype} "
                f"{tuple(self.scale.shape)} (supported: torch.int8 with scales torch.float32 {tuple(self.q.shape[:1])})"
            )

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """q * scale, rounded once: [N, K] of `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.q.to(wide) * self.scale.to(wide)[:, None]).to(dtype)


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """Weights [N, K] of any float dtype, scale = absmax / 127 of each row: off by half a scale at most.

    Raises WeightError for values that are not finite.
    """
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start, part in parts(weight):
        step = finite(part.abs().amax(1)) / LARGEST
        end = start + len(part)
        scale[start:end] = step
        q[start:end] = (part * inverse(step)[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Int8Weight(q, scale)
