"""Cases for the native test program (native/): random inputs, outputs computed in float64, how far off one may be."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.kernels.blocks import random_rows
from tokenspeed.kernels.cpu.registration import FORMATS

Case = tuple[str, Mapping[str, Any]]
"""A name whose first word is the kind, and arrays by name; a number is written as one float64."""
EPS = 2.0**-24
LEAST_EXP = 2e-38  # e^-87, the least that the kernels' exp gives, is less
STEP = 1 / 127 / 512 * 1.05
"""Half a step of the activations' 16-bit codes, of the largest in 32."""
PLAIN = ("F32", "F16", "BF16")


def write_cases(path: Path, cases: Iterable[Case]) -> Path:
    """See cases.cpp for the layout."""

    def sized(data: bytes) -> bytes:
        return struct.pack("<q", len(data)) + data

    parts = []
    for name, items in cases:
        parts.append(sized(name.encode()) + struct.pack("<q", len(items)))
        for key, value in items.items():
            array = value if isinstance(value, np.ndarray) else np.float64(value)
            parts[-1] += sized(key.encode()) + sized(array.tobytes())
    path.write_bytes(struct.pack("<q", len(parts)) + b"".join(parts))
    return path


def width(fmt: str, blocks: int) -> int:
    """Columns of `blocks` blocks; those of plain formats are odd."""
    return 256 * blocks if fmt.endswith(("_K", "_XS")) else 32 * blocks - (fmt in PLAIN)


def activations(count: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [count, cols] whose rows and blocks differ in size; one block is all zero."""
    x = rng.normal(size=(count, cols)) * rng.choice([1e-3, 1.0, 50.0], size=(count, 1))
    x *= 2.0 ** rng.integers(-6, 3, size=(1, -(-cols // 32))).repeat(32, axis=1)[:, :cols]
    x[0, :32] = 0
    return x.astype(np.float32)


def product_tolerance(fmt: str, x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[count, rows]: a bound of the rounding to codes, block by block, and of that of the float32 sums."""
    x, w = np.abs(x.astype(float)), np.abs(values)
    cols = x.shape[1]
    if fmt in PLAIN:
        return (cols / 2 + 3) * EPS * (x @ w.T) + 1e-30
    largest = x.reshape(len(x), -1, 32).max(axis=2)
    sums = w.reshape(len(w), -1, 32).sum(axis=2)
    # A value is a difference of two terms; each may be as large as the largest value of its row by far, not more.
    rounding = (cols / 32 + 6) * EPS * x.sum(axis=1)[:, None] * 2 * w.max(axis=1)[None]
    return STEP * (largest @ sums.T) + rounding + 1e-30


def linear_case(fmt: str, rows: int, blocks: int, count: int, rng: np.random.Generator) -> Case:
    cols = width(fmt, blocks)
    source, values = random_rows(fmt, rows, cols, rng)
    x = activations(count, cols, rng)
    return f"linear {fmt} {rows}x{cols}, {count} rows", product(fmt, FORMATS.index(fmt), source, values, x)


def product(fmt: str, code: int, source: np.ndarray, values: np.ndarray, x: np.ndarray) -> dict[str, Any]:
    """Rows `source` of a format that mean `values`, packed as format number `code`, times x."""
    (rows, cols), count = values.shape, len(x)
    return {
        "format": code,
        "rows": rows,
        "cols": cols,
        "count": count,
        "source": source,
        "x": x,
        "values": values,
        "values_allowed": 1e-6 * np.abs(values) + 4e-7 * np.abs(values).max(),
        "expected": x.astype(float) @ values.T,
        "allowed": product_tolerance(fmt, x, values),
    }


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Float64 [.., n]."""
    x = x.astype(float)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def act(gate: np.ndarray, silu: bool) -> np.ndarray:
    """Float64: silu, or the tanh form of gelu, of float64."""
    t = gate if silu else np.sqrt(8 / np.pi) * (gate + 0.044715 * gate**3)
    return gate / (1 + np.exp(np.minimum(-t, 700)))


def row_cases(n: int, rng: np.random.Generator) -> Iterator[Case]:
    """Every op on a row of n; a rotation of n pairs; the largest of n with ties."""
    x, other = (rng.normal(size=n).astype(np.float32) * 3 for _ in range(2))
    yield norm_case(x, other)
    total = x.astype(float) + other
    yield f"add {n}", {"x": x, "other": other, "expected": total, "allowed": 1.001 * EPS * np.abs(total)}
    for silu in (True, False):
        yield act_case((x * rng.choice([1, 30], size=n)).astype(np.float32), other, silu)
    for gate in (x, with_nan(30 * x, rng)):
        yield swiglu_case(gate.astype(np.float32), other)
    yield rotate_case(n, rng)
    yield act_case(with_nan(x, rng), other, n % 2 == 0)
    coarse = np.round(x)
    coarse[rng.random(n) < 0.2] = -np.inf
    yield f"argmax {n}", {"x": coarse, "expected": int(np.argmax(coarse))}


def with_nan(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(len(x)) < 0.3, np.float32(np.nan), x)


def norm_case(x: np.ndarray, weight: np.ndarray) -> Case:
    expected = rms_norm(x, weight, 1e-6)
    allowed = (len(x) / 8 + 8) * EPS * np.abs(expected)
    return f"rms_norm {len(x)}", {"x": x, "weight": weight, "eps": 1e-6, "expected": expected, "allowed": allowed}


def act_case(gate: np.ndarray, up: np.ndarray, silu: bool) -> Case:
    expected = act(gate.astype(float), silu) * up
    # An error in the exponent's argument, gate or its cube, is one in the result times its size.
    relative = 6 * EPS * (2 + np.abs(gate) ** (1 if silu else 3))
    allowed = relative * np.abs(expected) + LEAST_EXP * (1 + np.abs(gate * up))
    name = f"act_mul {len(gate)} {'silu' if silu else 'gelu'}{', NaN' if np.isnan(gate).any() else ''}"
    return name, {"x": gate, "up": up, "silu": silu, "expected": expected, "allowed": allowed}


def swiglu_case(gate: np.ndarray, up: np.ndarray, alpha: float = 1.5, limit: float = 2.0) -> Case:
    kept, moved = np.minimum(gate.astype(float), limit), np.clip(up.astype(float), -limit, limit)
    expected = kept / (1 + np.exp(np.minimum(-alpha * kept, 700))) * (moved + 1)
    allowed = 6 * EPS * (3 + alpha * np.abs(kept)) * np.abs(expected) + 1e-34
    name = f"swiglu_clamped {len(gate)}{', NaN' if np.isnan(gate).any() else ''}"
    items = {"x": gate, "up": up, "alpha": alpha, "limit": limit, "expected": expected, "allowed": allowed}
    return name, items


def rotate_case(half: int, rng: np.random.Generator) -> Case:
    head, angle = rng.normal(size=2 * half).astype(np.float32), rng.uniform(0, 100, half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b, c, s = (part.astype(float) for part in (head[:half], head[half:], cos, sin))
    expected = np.concatenate([a * c - b * s, b * c + a * s])
    allowed = 3 * EPS * (np.abs(a) + np.abs(b))
    return f"rotate {half}", {"x": head, "cos": cos, "sin": sin, "expected": expected, "allowed": np.tile(allowed, 2)}


def quantize_case(blocks: int, rng: np.random.Generator) -> Case:
    """Blocks from almost nothing to large, among them zeros, subnormal numbers, one lone value, NaN and infinities."""
    x = rng.normal(size=(blocks, 32)) * 10.0 ** rng.integers(-44, 30, size=(blocks, 1))
    x[rng.random((blocks, 32)) < 0.1] = 0
    x[0] = 0
    x[-1, 1:] = 0
    for block in range(4, blocks, 9):
        x[block, rng.integers(32, size=3)] = rng.choice([np.nan, np.inf, -np.inf])
    return f"quantize {blocks} blocks", {"x": x.astype(np.float32)}
