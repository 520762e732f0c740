"""Rotary embedding parameters: one description for every variant, resolved when a config is read. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed.contracts.errors import FormatError, UnsupportedError


@dataclass(frozen=True)
class Rope:
    """Rotation of the first `dim` columns of each head, halves paired (i, i + dim/2).

    The angle of pair i at position p is p / (theta^(2i/dim) * divisors[i]); no divisors means all 1.
    """

    theta: float
    dim: int
    divisors: tuple[float, ...] = ()


def linear_rope(theta: float, dim: int, factor: float) -> Rope:
    """Position interpolation by `factor` (arXiv:2306.15595)."""
    return Rope(theta, dim, (float(factor),) * (dim // 2))


def llama3_rope(theta: float, dim: int, scaling: Mapping[str, Any]) -> Rope:
    """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, a linear blend between (its model
    card)."""
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    divisors = []
    for i in range(dim // 2):
        turns = original / (2 * math.pi * theta ** (2 * i / dim))
        keep = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1.0 / ((1.0 - keep) / factor + keep))
    return Rope(theta, dim, tuple(divisors))


_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_from_hf(theta: float, dim: int, scaling: Mapping[str, Any] | None) -> Rope:
    """From a Hugging Face `rope_parameters` or `rope_scaling` entry.

    Raises UnsupportedError on a kind not listed, FormatError on a missing value.
    """
    kind = str((scaling or {}).get("rope_type", (scaling or {}).get("type", "default")))
    for key in _NEEDED.get(kind, ()):
        if (scaling or {}).get(key) is None:
            raise FormatError(f"rope type {kind!r} has no {key}")
    if scaling is None or kind == "default":
        return Rope(theta, dim)
    if kind == "linear":
        return linear_rope(theta, dim, float(scaling["factor"]))
    if kind == "llama3":
        return llama3_rope(theta, dim, scaling)
    raise UnsupportedError(f"rope type {kind!r} is not supported (supported: default, linear, llama3)")
