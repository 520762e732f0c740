"""Cases for the native test program's attention and small programs, with outputs computed in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.kernels.blocks import random_rows
from tests.kernels.native_cases import PLAIN, Case, act, rms_norm
from tests.kernels.native_kv import KV, decode, encode, rounding
from tokenspeed.kernels.cpu.registration import FORMATS

UNUSED = 1 << 24
"""A page id far outside: reading what no query sees stops the program."""


@dataclass(frozen=True)
class Shape:
    """What an attention case is about; `queries` of `group` heads each, the first at `first`."""

    queries: int = 1
    group: int = 1
    head_dim: int = 32
    page_size: int = 16
    first: int = 0
    window: int = 0
    kv: str = "BF16"
    softcap: float = 0.0

    def __str__(self) -> str:
        pages = f"pages of {self.page_size} {self.kv}"
        where = f"at {self.first}, window {self.window}, cap {self.softcap}"
        return f"{self.queries}x{self.group} of {self.head_dim} {where}, {pages}"


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, window: int, scale: float, softcap: float = 0.0
) -> np.ndarray:
    """Float64 [queries, group, dim] of q of that shape, k and v [keys, dim]; query i is at position first + i."""
    scores = np.einsum("qgd,kd->qgk", q.astype(float), k.astype(float)) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    position, key = first + np.arange(len(q))[:, None], np.arange(len(k))[None]
    seen = (key <= position) & ((window == 0) | (key > position - window))
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return np.einsum("qgk,kd->qgd", weights / weights.sum(axis=2, keepdims=True), v.astype(float))


def attention_case(shape: Shape, rng: np.random.Generator) -> Case:
    """The second of two key heads; pages in random order, those behind the window not there."""
    length = shape.first + shape.queries
    q_stride = 2 * shape.group * shape.head_dim + 3
    q = rng.normal(size=shape.queries * q_stride).astype(np.float32) * 2
    heads = np.stack([q[i * q_stride :][: shape.group * shape.head_dim] for i in range(shape.queries)])
    pages = -(-length // shape.page_size)
    order = rng.permutation(pages + 2)[:pages].astype(np.int32)
    arena = rng.normal(size=(pages + 2, 2, shape.page_size, 2, shape.head_dim)) * rng.choice([1, 9], shape.head_dim)
    stored = encode(shape.kv, arena)
    held = decode(shape.kv, stored, shape.head_dim)
    k, v = (held[order, part, :, 1].reshape(-1, shape.head_dim)[:length] for part in (0, 1))
    scale = 0.2 / np.sqrt(shape.head_dim)
    used = q[: (shape.queries - 1) * q_stride + shape.group * shape.head_dim]
    expected = attend(
        heads.reshape(shape.queries, shape.group, -1),
        k,
        v,
        shape.first,
        shape.window,
        float(np.float32(scale)),
        shape.softcap,
    )
    live = max(0, shape.first - shape.window + 1) if shape.window else 0
    for position in (*range(live), *range(length, pages * shape.page_size)):  # NaN in every format
        stored[order[position // shape.page_size], :, position % shape.page_size] = 0xFF
    order[: live // shape.page_size] = UNUSED
    entry = stored.shape[-1]
    return f"attention {shape}", {
        "q": used,
        "q_stride": q_stride,
        "queries": shape.queries,
        "group": shape.group,
        "head_dim": shape.head_dim,
        "format": KV.index(shape.kv),
        "kv": stored,
        "table": order,
        "strides": np.array([4 * shape.page_size * entry, 2 * shape.page_size * entry, 2 * entry, entry]),
        "page_size": shape.page_size,
        "first_position": shape.first,
        "window": shape.window,
        "scale": scale,
        "softcap": shape.softcap,
        "expected": expected,
        "allowed": np.full(expected.shape, (1e-6 + 1e-6 * shape.softcap) * float(np.abs(v).max())),
    }


@dataclass(frozen=True)
class WalkShape:
    """Sequences of these lengths; `half` pairs of a head are turned, q and k normed first or not."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    half: int
    page_size: int
    window: int = 0
    kv: str = "BF16"
    normed: bool = False

    def __str__(self) -> str:
        pages = f"pages of {self.page_size} {self.kv}"
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}, {'' if self.normed else 'not '}normed"
        return f"{self.lengths} {heads}, window {self.window}, {pages}"


def walk_case(s: WalkShape, rng: np.random.Generator) -> Case:
    """Sequences of random queries, keys and values: rotation, page writes, attention over what the pages then hold."""
    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    embeddings = rng.normal(size=(sum(s.lengths), width)).astype(np.float32)
    frequency = (100.0 ** -(np.arange(s.half) / s.half)).astype(np.float32)
    norms = [(rng.random(s.head_dim if s.normed else 0) + 0.5).astype(np.float32) for _ in range(2)]
    pages = [-(-length // s.page_size) for length in s.lengths]
    sequences = np.split(embeddings, np.cumsum(s.lengths)[:-1])
    parts = [written(s, rows, frequency, norms) for rows in sequences]
    q, k, v = (np.concatenate(each) for each in zip(*parts, strict=True))
    return f"walk {s}", {
        "heads": s.heads,
        "kv_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "page_size": s.page_size,
        "window": s.window,
        "format": KV.index(s.kv),
        "scale": 1.3 / np.sqrt(s.head_dim),
        "eps": 1e-6,
        "embeddings": embeddings,
        "frequency": frequency,
        "q_norm": norms[0],
        "k_norm": norms[1],
        "lengths": np.array(s.lengths, np.int32),
        "pages": sum(pages) + 1,
        "tables": rng.permutation(sum(pages) + 1)[: sum(pages)].astype(np.int32),
        "table_start": np.cumsum([0, *pages[:-1]]),
        "q": q,
        "keys": k,
        "keys_allowed": rounding(s.kv, k),
        "values": v,
        "values_allowed": rounding(s.kv, v),
        "allowed": 3e-6 * float(np.abs(embeddings).max()),
    }


def written(
    s: WalkShape, rows: np.ndarray, frequency: np.ndarray, norms: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float64 [tokens, heads, dim]: one sequence's queries, keys and values before these are rounded for their page."""
    parts = rows.reshape(len(rows), -1, s.head_dim).astype(float)
    q, k, v = np.split(parts, [s.heads, s.heads + s.kv_heads], axis=1)
    q, k = (rotated(rms_norm(x, w, 1e-6) if s.normed else x, frequency) for x, w in ((q, norms[0]), (k, norms[1])))
    return q, k, v


def rotated(x: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """x [tokens, heads, dim] with its first 2 half columns turned; the angles are float32 products, as models have."""
    half = len(frequency)
    angle = (np.arange(len(x), dtype=np.float32)[:, None] * frequency).astype(float)[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), rest], axis=-1)


def block_case(fmt: str, tokens: int, cols: int, ff: int, silu: bool, rng: np.random.Generator) -> Case:
    """Two norms, a join, gate and up, down with a bias, and the plain ops that fusing leaves out."""
    rows = rng.normal(size=(tokens, 2 * cols)).astype(np.float32)
    gate_up, gate_up_values = random_rows(fmt, 2 * ff, cols, rng)
    down, down_values = random_rows(fmt, cols, ff, rng)
    # The formats' random values differ in size by far.
    vectors = {
        name: (rng.random(cols) + 0.5).astype(np.float32) for name in ("norm", "branch_norm", "out_norm", "bias")
    }
    vectors["norm"] = (vectors["norm"] / (np.abs(gate_up_values).mean() * np.sqrt(cols))).astype(np.float32)
    x, branch = np.split(rows.astype(float) * 0.5, 2, axis=1)
    joined = x + rms_norm(branch, vectors["branch_norm"], 1e-6)
    gate, up = np.split(rms_norm(joined, vectors["norm"], 1e-6) @ gate_up_values.T, 2, axis=1)
    out = joined + (act(gate, silu) * up) @ down_values.T + vectors["bias"] + act(x, silu) * branch
    expected = rms_norm(out, vectors["out_norm"], 1e-6)
    return f"block {fmt} {tokens} tokens, {cols} to {ff}, {'silu' if silu else 'gelu'}", {
        "format": FORMATS.index(fmt),
        "tokens": tokens,
        "cols": cols,
        "ff": ff,
        "act": 0 if silu else 1,
        "eps": 1e-6,
        "embeddings": rows,
        "gate_up": gate_up,
        "down": down,
        **vectors,
        "expected": expected,
        "allowed": np.full(expected.shape, (6e-6 if fmt in PLAIN else 4e-4) * np.abs(expected).max()),
    }
