"""The sampler in plain Python, one row at a time in float64, as obviously as it can be written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from tokenspeed.contracts.step import SamplingRow

CLOSE = 1e-4
"""Scores, and probabilities collected for top_p, this near to each other may fall either way in float32."""


def reference_tokens(
    logits: Sequence[float],
    row: SamplingRow,
    tokens: Sequence[int],
    num_prompt: int,
    position: int,
    mask: Sequence[bool] | None = None,
) -> set[int]:
    """The token at `position`; several where rounding may decide."""
    scores = edited(logits, row, tokens, num_prompt, position, mask)
    if row.temperature == 0:
        best = max(scores)
        return {min(v for v, score in enumerate(scores) if score == best)}
    kept_sets = kept_tokens([score / row.temperature for score in scores], row)
    found: set[int] = set()
    for kept in kept_sets:
        noisy = {v: scores[v] / row.temperature + noise(row, position, v) for v in kept}
        best = max(noisy.values())
        found |= {v for v, score in noisy.items() if score > best - CLOSE}
    return found


def edited(
    logits: Sequence[float],
    row: SamplingRow,
    tokens: Sequence[int],
    num_prompt: int,
    position: int,
    mask: Sequence[bool] | None,
) -> list[float]:
    scores, output = list(logits), list(tokens[num_prompt:position])
    for v in range(len(scores)):
        if row.allowed_ids is not None and v not in row.allowed_ids:
            scores[v] = -math.inf
        if v in row.banned_ids or (mask is not None and not mask[v]):
            scores[v] = -math.inf
    for word in row.bad_words:
        if len(output) >= len(word) - 1 and output[len(output) - len(word) + 1 :] == word[:-1]:
            scores[word[-1]] = -math.inf
    for v, bias in row.logit_bias:
        scores[v] += bias
    counts = Counter(output)
    for v in set(tokens[:position]):
        scores[v] = scores[v] / row.repetition_penalty if scores[v] > 0 else scores[v] * row.repetition_penalty
    for v, count in counts.items():
        scores[v] -= row.frequency_penalty * count + row.presence_penalty
    if len(output) < row.min_tokens:
        for v in row.stop_ids:
            scores[v] = -math.inf
    return scores


def kept_tokens(scaled: Sequence[float], row: SamplingRow) -> list[set[int]]:
    """What the filters keep; more than one set where rounding may decide where top_p or a near tie ends."""
    best = max(scaled)
    kept = {v for v, score in enumerate(scaled) if score > -math.inf}
    if row.min_p:
        kept = {v for v in kept if math.exp(scaled[v] - best) >= row.min_p * (1 - 1e-6)}
    if row.top_k and row.top_k < len(kept):
        kth = sorted((scaled[v] for v in kept), reverse=True)[row.top_k - 1]
        kept = {v for v in kept if scaled[v] >= kth - 1e-6 * (1 + abs(kth))}
    if row.top_p == 1:
        return [kept]
    return [top_p_set(scaled, kept, row.top_p + slack) for slack in (-1e-5, 0.0, 1e-5)]


def top_p_set(scaled: Sequence[float], kept: set[int], top_p: float) -> set[int]:
    best = max(scaled[v] for v in kept)
    weight = {v: math.exp(scaled[v] - best) for v in kept}
    total, before, last = sum(weight.values()), 0.0, best
    for v in sorted(kept, key=lambda v: -scaled[v]):
        if before >= top_p * total:
            break
        before, last = before + weight[v], scaled[v]
    return {v for v in kept if scaled[v] >= last - 1e-6 * (1 + abs(last))}


def noise(row: SamplingRow, position: int, token: int) -> float:
    u = (plain_philox(row.seed, row.sample_index, position, token) + 0.5) * 2.0**-32
    return -math.log(-math.log1p(-min(u, 1 - 2.0**-24)))


def plain_philox(seed: int, sample: int, position: int, token: int) -> int:
    mask = 2**32 - 1
    c, k = [token // 4, position & mask, sample, 0], [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c[token % 4]
