"""Gumbel noise in kernels: the function of (seed, sample index, position, token id) that `runner/noise.py` defines."""

from __future__ import annotations

import triton
import triton.language as tl

HIGHEST_NOISE = 22.88
REACH = tl.constexpr(HIGHEST_NOISE + 2.82 + 0.3)
"""A token this far below the best of its row cannot win: the noise's range, and 0.3 for rounding of scaled logits."""
_SCREEN_SLACK = tl.constexpr(1e-4)
"""Covers the rounding of `gumbel` and of the screen's own logarithm."""


@triton.jit
def block_words(blocks: tl.tensor, key: tl.tuple) -> tl.tuple:
    """The four uint32 words of Philox4x32-10 for each block of four tokens (int32).

    key: int32 scalars position, sample index, low and high half of the seed.
    """
    position, sample, seed_low, seed_high = key
    return tl.philox_impl(
        blocks.to(tl.uint32, bitcast=True),
        position.to(tl.uint32, bitcast=True),
        sample.to(tl.uint32, bitcast=True),
        blocks.to(tl.uint32, bitcast=True) * 0,
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
    )


@triton.jit
def token_words(ids: tl.tensor, key: tl.tuple) -> tl.tensor:
    """The word of each token id (int32, any order)."""
    w0, w1, w2, w3 = block_words(ids // 4, key)
    place = ids % 4
    return tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))


@triton.jit
def _uniform(words: tl.tensor) -> tl.tensor:
    return tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)


@triton.jit
def gumbel(words: tl.tensor) -> tl.tensor:
    """-log(-log(1 - u)), float32; log(1 - u) by Goldberg's formula (ACM Computing Surveys 23, 1991, theorem 4)."""
    u = _uniform(words)
    rest = 1.0 - u
    taken = 1.0 - rest
    exponential = tl.where(taken == 0.0, u, -tl.log(rest) * tl.div_rn(u, tl.where(taken == 0.0, 1.0, taken)))
    return -tl.log(exponential)


@triton.jit
def gumbel_screen(words: tl.tensor) -> tl.tensor:
    """No less than `gumbel`, and mostly less than 0.07 more, at a fifth of its cost.

    -log(1 - u) is more than the first terms of its series, and log2 y more than y's bits as a number: exponent plus
    mantissa.
    """
    u = _uniform(words)
    less = u * (1.0 + u * (0.5 + u * 0.3333))
    octaves = less.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07 - 127.0
    return octaves * -0.6931472 + _SCREEN_SLACK
