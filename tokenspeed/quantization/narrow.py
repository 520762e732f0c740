"""Weights as GPU kernels read them: one of four narrow types, made of plain matrices when a model is loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenspeed.contracts.errors import UnsupportedError, WeightError
from tokenspeed.quantization import fp8, int4, int8, mxfp4
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.int4 import Int4Weight
from tokenspeed.quantization.int8 import Int8Weight
from tokenspeed.quantization.mxfp4 import Mxfp4Weight
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts, quantize_experts

PackedWeight = Int8Weight | Int4Weight | Mxfp4Weight
"""Narrow weights beside activations of the compute dtype."""
NarrowWeight = Fp8Weight | PackedWeight
Narrow = NarrowWeight | Mxfp4Experts
"""Of a matrix, or of experts."""
FORMATS = {"fp8": fp8.FORMAT, "int8": int8.FORMAT, "int4": int4.FORMAT, "mxfp4": mxfp4.FORMAT}
"""Name of the stored format of each mode of `groups.GPU_MODES`."""
PACKED_FORMATS = frozenset(FORMATS.values()) - {fp8.FORMAT}
"""Of a `PackedWeight`."""
EXPERT_MODES = ("fp8", "mxfp4")
_QUANTIZE: dict[str, Callable[[torch.Tensor], NarrowWeight]] = {
    "fp8": fp8.quantize_fp8,
    "int8": int8.quantize_int8,
    "int4": int4.quantize_int4,
    "mxfp4": mxfp4.quantize_mxfp4,
}


def narrow(weight: torch.Tensor, mode: str, name: str) -> Narrow:
    """A matrix [N, K], or of fp8 and mxfp4 one per expert [E, N, K], as `mode` holds it, on its device.

    Raises UnsupportedError where the columns are no whole groups and for experts, WeightError for values that are not
    finite; both name the weight.
    """
    if weight.dim() > 2 and mode not in EXPERT_MODES:
        raise UnsupportedError(
            f"--quantization {mode}: weight {name}: experts are supported in {' and '.join(EXPERT_MODES)} only"
        )
    try:
        made: Narrow = quantize_experts(weight) if weight.dim() > 2 and mode == "mxfp4" else _QUANTIZE[mode](weight)
    except WeightError as error:
        raise WeightError(f"weight {name}: {error}") from None
    except UnsupportedError as error:
        raise UnsupportedError(f"--quantization {mode}: weight {name}: {error}") from None
    if isinstance(made, Fp8Weight) and not made.scale.isfinite().all():
        raise WeightError(f"weight {name}: values that are not finite, or too large to be quantised")
    return made
