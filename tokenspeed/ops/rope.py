"""Rotary embedding parameters: one description for every variant, resolved when a config is read. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenspeed.contracts.errors import FormatError, UnsupportedError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
"""As `rope_type` names them."""


@dataclass(frozen=True)
class Rope:
    """Rotation of the first `dim` columns of each head, halves paired (i, i + dim/2).

    The angle of pair i at position p is p / (theta^(2i/dim) * divisors[i]); no divisors means all 1. Cosines and sines
    are multiplied by `scale`, which leaves columns that do not turn as they are.
    """

    theta: float
    dim: int
    divisors: tuple[float, ...] = ()
    scale: float = 1.0


def no_rope(dim: int) -> Rope:
    """The rotation of layers that have none: every angle is exactly 0."""
    return Rope(1.0, dim, (math.inf,) * (dim // 2))


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


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's scale of cosines and sines, 0.1 ln(factor) + 1 (arXiv:2309.00071, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_rope(
    theta: float,
    dim: int,
    factor: float,
    original: int,
    scale: float | None = None,
    fast: float = 32.0,
    slow: float = 1.0,
    truncate: bool = True,
) -> Rope:
    """YaRN (arXiv:2309.00071): pairs that turn less than `slow` times in the `original` context are divided by
    `factor`, those that turn more than `fast` times kept, a linear blend by pair between. truncate: the blend starts
    and ends at whole pairs. scale: by default `yarn_scale`."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(fast), pair_that_turns(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    shares = [min(1.0, max(0.0, (i - low) / width)) for i in range(dim // 2)]
    divisors = tuple(1.0 / (share / factor + 1.0 - share) for share in shares)
    return Rope(theta, dim, divisors, yarn_scale(factor) if scale is None else scale)


def longrope_scale(factor: float, original: int) -> float:
    """LongRoPE's scale of cosines and sines, sqrt(1 + ln(factor) / ln(original)) (arXiv:2402.13753)."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def longrope(theta: float, dim: int, factors: Sequence[float], scale: float) -> Rope:
    """LongRoPE with one of its two lists of divisors. Raises FormatError on a list of another length."""
    if len(factors) != dim // 2:
        raise FormatError(f"rope type 'longrope' has {len(factors)} factors for {dim // 2} pairs of columns")
    return Rope(theta, dim, tuple(map(float, factors)), scale)


_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


def rope_kind(scaling: Mapping[str, Any] | None) -> str:
    """The kind that a `rope_parameters` or `rope_scaling` entry names; "su" is an older name of "longrope"."""
    kind = str((scaling or {}).get("rope_type", (scaling or {}).get("type", "default")))
    return "longrope" if kind == "su" else kind


def rope_from_hf(
    theta: float, dim: int, scaling: Mapping[str, Any] | None, context: int = 0, long: bool = False
) -> Rope:
    """From a Hugging Face `rope_parameters` or `rope_scaling` entry, for a model with `context` positions
    (`max_position_embeddings`). long: LongRoPE's factors for what is longer than the original context.

    "dynamic" (NTK) depends on the length of the sequence beyond `context` and is no scaling at all up to it, so here,
    where no sequence is longer than the context, it is the plain rotation.
    Raises UnsupportedError on a kind not listed, FormatError on a missing value.
    """
    kind, given = rope_kind(scaling), dict(scaling or {})
    if kind not in KINDS:
        raise UnsupportedError(f"rope type {kind!r} is not supported (supported: {', '.join(KINDS)})")
    for key in _NEEDED.get(kind, ()):
        if given.get(key) is None:
            raise FormatError(f"rope type {kind!r} has no {key}")
    if dim < 2 or dim % 2:
        raise UnsupportedError(f"a rotation of {dim} columns of a head is not supported (supported: an even number)")
    if kind == "linear":
        return linear_rope(theta, dim, float(given["factor"]))
    if kind == "llama3":
        return llama3_rope(theta, dim, given)
    if kind in ("yarn", "longrope"):
        return _stretched(kind, theta, dim, given, context, long)
    return Rope(theta, dim)


def _stretched(kind: str, theta: float, dim: int, given: Mapping[str, Any], context: int, long: bool) -> Rope:
    original = original_context(given, context)
    factor = float(given.get("factor") or context / original)
    scale = given.get("attention_factor")
    if kind == "longrope":
        factors = given["long_factor" if long else "short_factor"]
        return longrope(theta, dim, factors, longrope_scale(factor, original) if scale is None else float(scale))
    above, below = given.get("mscale"), given.get("mscale_all_dim")
    if scale is None and above and below:
        scale = yarn_scale(factor, above) / yarn_scale(factor, below)
    fast, slow = float(given.get("beta_fast") or 32), float(given.get("beta_slow") or 1)
    return yarn_rope(theta, dim, factor, original, scale, fast, slow, bool(given.get("truncate", True)))


def original_context(scaling: Mapping[str, Any], context: int) -> int:
    """Positions that the model had before its rotation was stretched. Raises FormatError where that is no length."""
    original = scaling.get("original_max_position_embeddings") or context
    if not isinstance(original, int) or original < 2:
        raise FormatError(f"original_max_position_embeddings must be a length, got {original!r}")
    return original
