"""Cases of weights in planes, of tokens drawn by the head, and of the noise they are drawn with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from tests.kernels.blocks import random_rows
from tests.kernels.native_cases import Case, activations
from tests.kernels.native_cases import product as exact_product
from tests.runner.sampler_reference import plain_philox
from tokenspeed.kernels.cpu.registration import FORMATS, PLANES

TEMPERATURES = (0.0, 0.01, 0.7, 1.0, 3.0)


def planes_case(rows: int, blocks: int, count: int, rng: np.random.Generator, aligned: bool = False) -> Case:
    """Q8_0 rows in two planes times x. Aligned: the low plane gives every product nearly all that it can."""
    cols = 32 * blocks
    source, values = random_rows("Q8_0", rows, cols, rng)
    x = activations(count, cols, rng)
    if aligned:
        signs = rng.choice([-1, 1], size=(1, blocks, 32))
        codes = source.reshape(rows, blocks, 34)
        codes[:, :, 2:] = (codes[:, :, 2:] & 0xF0) | np.where(signs > 0, 15, 0).astype(np.uint8)
        d = codes[:, :, :2].copy().view(np.float16).astype(float)
        values = (d * codes[:, :, 2:].copy().view(np.int8)).reshape(rows, cols)
        x = (np.abs(rng.normal(size=(count, 1))) * signs.reshape(1, cols)).astype(np.float32)
    name = f"planes {rows}x{cols}, {count} rows{', aligned' if aligned else ''}"
    return name, exact_product("Q8_0", PLANES, source, values, x)


def keys(count: int, rng: np.random.Generator) -> dict[str, Any]:
    """What decides the noise of rows, beside the token: seeds, samples and positions of full width."""
    bound = np.iinfo(np.uint32).max
    return {
        "seed": rng.integers(np.iinfo(np.uint64).max, size=count, dtype=np.uint64, endpoint=True),
        "sample": rng.integers(bound, size=count, dtype=np.uint32, endpoint=True),
        "position": rng.integers(bound, size=count, dtype=np.uint32, endpoint=True),
    }


def filters(count: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
    """Some of top_k, top_p and min_p for each row; none without randomness."""
    top_k, top_p, log_min_p = np.zeros(count, np.int64), np.ones(count), np.full(count, -np.inf, np.float32)
    if rng is not None:
        top_k[:] = rng.choice([0, 1, 2, 40, 1000, 2**31], size=count)
        top_p[:] = rng.choice([1.0, 1e-6, 0.3, 0.95], size=count)
        log_min_p[:] = rng.choice([-np.inf, -7, -1, 0], size=count)
    return {"top_k": top_k, "top_p": top_p, "log_min_p": log_min_p}


def draw_case(
    kind: str, rows: int, blocks: int, count: int, rng: np.random.Generator, fmt: str = "Planes", filtered: bool = False
) -> Case:
    """Tokens for `count` rows out of `rows`, at temperatures in turn. kind: random; ties, where rows of weights are
    equal and one row of x is zero; nan, where some rows of x are no numbers; negative, where no logit is above zero;
    huge, where logits are beyond all floats."""
    cols = 32 * blocks
    source, values = random_rows("Q8_0" if fmt == "Planes" else fmt, rows, cols, rng)
    x = rng.normal(size=(count, cols)).astype(np.float32)
    x[::2] = values[rng.integers(rows, size=len(x[::2]))] * rng.choice([0.1, 1, 30])  # sure ones
    if kind == "ties":
        source = source[rng.integers(min(rows, 5), size=rows)]
        x[-1] = 0
    elif kind == "nan":
        x[::2, rng.integers(cols)] = rng.choice([np.nan, np.inf, -np.inf])
    elif kind in ("negative", "huge"):
        blocks_of = source.reshape(rows, blocks, 34)
        blocks_of[:, :, 2:] = rng.integers(1, 128, size=(rows, blocks, 32))
        blocks_of[:, :, :2] = np.array([0.25], np.float16).view(np.uint8)
        # No sum may end near the largest float, where the order of its terms decides whether it is one.
        x = -np.clip(np.abs(x), 1, 30) * np.float32(1e37) if kind == "huge" else -np.clip(np.abs(x), 0.01, 30)
    first = rng.integers(len(TEMPERATURES))
    return f"draw {kind} {fmt} {rows}x{cols}, {count} rows, from {TEMPERATURES[first]}{', filtered' * filtered}", {
        "format": PLANES if fmt == "Planes" else FORMATS.index(fmt),
        "rows": rows,
        "cols": cols,
        "count": count,
        "source": source,
        "x": x,
        "temperature": np.roll(np.resize(TEMPERATURES, max(5, count)), -first)[:count].astype(np.float32),
        **keys(count, rng),
        **filters(count, rng if filtered else None),
    }


def level_case(rows: int, rng: np.random.Generator) -> Case:
    """Logits that the noise makes equal, as near as float32 can: every token is left to the sampler."""
    ask = keys(1, rng)
    temperature = np.float32(rng.choice(TEMPERATURES[2:]))
    words = [plain_philox(int(ask["seed"][0]), int(ask["sample"][0]), int(ask["position"][0]), i) for i in range(rows)]
    logits = np.array([-noise(word) * float(temperature) for word in words], np.float32)[:, None]
    return f"draw level F32 {rows}x1, 1 rows, at {temperature}", {
        "format": FORMATS.index("F32"),
        "rows": rows,
        "cols": 1,
        "count": 1,
        "source": logits,
        "x": np.ones((1, 1), np.float32),
        "temperature": temperature.reshape(1),
        **ask,
        **filters(1),
    }


def gumbel_case(count: int, rng: np.random.Generator) -> Case:
    """Noise of 64 tokens for each of some keys, the smallest and the largest among them."""
    ask = keys(count, rng)
    for i, values in ((0, (0, 0, 0)), (-1, (2**64 - 1, 2**32 - 1, 2**32 - 1))):
        ask["seed"][i], ask["sample"][i], ask["position"][i] = values
    first = 64 * rng.integers(2**20, size=count)
    first[0] = 0
    expected = np.array(
        [
            noise(plain_philox(int(seed), int(sample), int(position), int(at) + i))
            for seed, sample, position, at in zip(ask["seed"], ask["sample"], ask["position"], first, strict=True)
            for i in range(64)
        ]
    )
    return f"gumbel {count} keys", {
        **ask,
        **filters(count),
        "temperature": np.ones(count, np.float32),
        "first": first,
        "expected": expected,
        "allowed": 1e-5 * np.abs(expected) + 1e-6,
    }


def noise(word: int) -> float:
    """Gumbel noise of a word in float64; u is the float32 that the sampler's is."""
    u = np.float32(np.float32(word) + np.float32(0.5)) * np.float32(2.0**-32)
    return -math.log(-math.log1p(-min(float(u), 1 - 2.0**-24)))


def head_cases(rng: np.random.Generator) -> Iterator[Case]:
    for rows, blocks, count in ((1, 1, 1), (16, 2, 3), (37, 3, 17), (5, 9, 8), (130, 20, 6)):
        yield planes_case(rows, blocks, count, rng)
        yield planes_case(rows, blocks, count, rng, aligned=True)
    yield gumbel_case(100, rng)
    for rows in (1, 15, 17, 63, 65, 333, 1000, 4099):
        for count in range(1, 6):
            yield draw_case("random", rows, int(rng.integers(1, 6)), count, rng)
            yield draw_case("ties", rows, 1, count, rng)
    for kind in ("nan", "negative", "huge"):
        for rows, count in ((3, 1), (70, 3), (333, 5)):
            yield draw_case(kind, rows, 2, count, rng)
    for kind, rows, count in product(("random", "ties", "nan", "negative", "huge"), (1, 65, 1000, 9001), (1, 3, 5)):
        yield draw_case(kind, rows, 2, count, rng, filtered=True)
    for fmt, _ in product(("F32", "Q4_0"), range(4)):
        yield draw_case("random", 4197, 2, 5, rng, fmt, filtered=True)
    for fmt in ("F32", "Q4_0", "Q8_0"):
        yield draw_case("random", 4197, 2, 3, rng, fmt)
        yield draw_case("nan", 70, 2, 3, rng, fmt)
    yield level_case(200, rng)
    for kind in ("ties", "negative", "huge"):
        yield draw_case(kind, 70, 2, 5, rng, "Q8_0")


def few_head_cases(rng: np.random.Generator) -> Iterator[Case]:
    yield planes_case(37, 3, 6, rng)
    yield planes_case(20, 5, 3, rng, aligned=True)
    yield gumbel_case(8, rng)
    for count in range(1, 6):
        yield draw_case("random", 333, 3, count, rng)
    for kind in ("ties", "nan", "negative", "huge"):
        yield draw_case(kind, 77, 2, 4, rng)
        yield draw_case(kind, 77, 2, 4, rng, filtered=True)
    for count in (1, 3, 5):
        yield draw_case("random", 9001, 1, count, rng, filtered=True)
    yield draw_case("random", 333, 2, 5, rng, "Q4_0")
    yield draw_case("random", 333, 2, 5, rng, "Q4_0", filtered=True)
    yield draw_case("nan", 37, 2, 3, rng, "F32")
    yield level_case(77, rng)
