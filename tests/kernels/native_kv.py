"""What KV pages hold, in numpy, by a second hand: entries from values, values from entries, how far they may be apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.kernels.native_cases import Case

KV = ("F32", "BF16", "Int8", "Fp8")
"""In the order of the C++ enum."""
GROUP = 32
E4M3 = np.array([m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127])
"""Its values that are not negative, in the order of their codes; code 127 is NaN."""
NAN_BITS = 0x7FC0


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """uint16: float32 rounded to nearest, ties to even; NaN stays NaN."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def e4m3_codes(x: np.ndarray) -> np.ndarray:
    """uint8: rounded to nearest, ties to the even code; what is beyond 448 becomes that, NaN stays NaN."""
    size, middles = np.abs(x.astype(float)), (E4M3[1:] + E4M3[:-1]) / 2
    below, above = (np.searchsorted(middles, size, side) for side in ("left", "right"))
    codes = np.where(below % 2 == 0, below, above)
    return (np.where(np.isnan(x), 127, codes) | np.signbit(x) << 7).astype(np.uint8)


def int8_entries(x: np.ndarray) -> np.ndarray:
    """uint8 [..., dim + 2 scales] of float32 [..., dim]. A group that holds NaN or an infinity: zeros and a NaN scale."""
    dim = x.shape[-1]
    groups = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -dim % GROUP)]).reshape(*x.shape[:-1], -1, GROUP)
    broken = ~np.isfinite(groups).all(-1)
    groups = np.where(broken[..., None], 0, groups).astype(np.float32)
    bits = bf16_bits(np.abs(groups).max(-1) / np.float32(127))
    scales = bf16_values(bits)
    tiny = scales < np.finfo(np.float32).tiny
    inverse = np.where(tiny, 0, 1 / np.where(tiny, 1, scales)).astype(np.float32)
    codes = np.clip(np.rint(groups * inverse[..., None]), -127, 127).astype(np.int8)
    flat = codes.reshape(*x.shape[:-1], -1)[..., :dim]
    scale_bytes = np.where(broken, np.uint16(NAN_BITS), bits).astype(np.uint16).view(np.uint8)
    return np.concatenate([flat.view(np.uint8), scale_bytes], axis=-1)


def encode(kv: str, x: np.ndarray) -> np.ndarray:
    """Entries, uint8 [..., entry bytes], of float32 [..., dim]."""
    x = np.ascontiguousarray(x, np.float32)
    if kv == "F32":
        return x.view(np.uint8)
    if kv == "BF16":
        return bf16_bits(x).view(np.uint8)
    return int8_entries(x) if kv == "Int8" else e4m3_codes(x)


def decode(kv: str, entries: np.ndarray, dim: int) -> np.ndarray:
    """Float64 [..., dim] of entries."""
    if kv == "F32":
        return entries.view(np.float32).astype(float)
    if kv == "BF16":
        return bf16_values(entries.view(np.uint16)).astype(float)
    if kv == "Fp8":
        return np.where(entries < 128, 1, -1) * np.append(E4M3, np.nan)[entries & 127]
    scales = bf16_values(np.ascontiguousarray(entries[..., dim:]).view(np.uint16)).astype(float)
    return entries[..., :dim].view(np.int8) * np.repeat(scales, GROUP, axis=-1)[..., :dim]


def rounding(kv: str, x: np.ndarray) -> np.ndarray:
    """How far what an entry holds may be from float64 x [..., dim], itself computed in float32."""
    if kv == "Int8":
        groups = np.pad(np.abs(x), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % GROUP)])
        largest = groups.reshape(*x.shape[:-1], -1, GROUP).max(-1)
        return np.repeat(largest, GROUP, axis=-1)[..., : x.shape[-1]] * (0.505 / 127)
    step = {"F32": 0, "BF16": 2.0**-8, "Fp8": 2.0**-4}[kv]
    smallest = 2.0**-10 if kv == "Fp8" else 0
    return np.maximum(step * np.abs(x), smallest) + 2e-6 * np.abs(x).max()


def store_case(kv: str, dim: int, rng: np.random.Generator) -> Case:
    """Entries of all magnitudes, with ties, and with NaN, infinities, -0, the smallest and the largest number."""
    x = rng.normal(size=(40, dim)) * 10.0 ** rng.integers(-42, 20, size=(40, 1))
    x[::5] = rng.normal(size=(8, dim)) * 10.0 ** rng.integers(-4, 3, size=(8, dim))
    x[1::5] = np.round(x[1::5] / np.abs(x[1::5]).max(axis=1, keepdims=True) * 63.5) + 63.5  # ties, were the scale one
    x = x.astype(np.float32)
    x[2::10] = bf16_values(bf16_bits(x[2::10])) * np.float32(1 + 2.0**-8)  # ties of bfloat16, mostly
    x[7::10] = rng.choice((E4M3[1:] + E4M3[:-1]) / 2, size=(4, dim)) * rng.choice([-1, 1], size=(4, dim))
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4028235e38], np.float32)
    for row, value in zip(x[3::5], special, strict=False):
        row[rng.integers(dim)] = value
    return f"store_kv {kv} {dim}", {
        "x": x,
        "format": KV.index(kv),
        "head_dim": dim,
        "expected": encode(kv, x),
    }


def store_cases(rng: np.random.Generator) -> Iterator[Case]:
    for kv in KV:
        for dim in (16, 80, 256) if kv == "Int8" else (16, 33, 80, 256):
            yield store_case(kv, dim, rng)
