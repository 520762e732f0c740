"""From logits to tokens: Gumbel-max with counter-based noise, so a token depends on its key and logits alone.

The noise of token v at position p is a pure function of (seed, sample index, p, v). Hence equal logits give equal
tokens in any batch, slot or order, and temperature 0 is the argmax without noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.contracts.step import SamplingRow, TokenLogprobs

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(seed: int, sample: int, position: int, count: int, device: torch.device) -> torch.Tensor:
    """uint32 words 0..count-1 of a stream, as int64 [count]: Philox4x32-10 (Salmon et al., SC 2011).

    Counter (v // 4, position, sample, 0) and key `seed` give the words of tokens 4 (v // 4) .. + 3.
    """
    blocks = -(-count // 4)
    c0 = torch.arange(blocks, dtype=torch.int64, device=device)
    c1, c2, c3 = (torch.full_like(c0, word) for word in (position & _LOW, sample & _LOW, 0))
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, p1 & _LOW, _high(p0) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=1).reshape(-1)[:count]


def _high(product: torch.Tensor) -> torch.Tensor:
    return (product >> 32) & _LOW


def gumbel(seed: int, sample: int, position: int, count: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise of tokens 0..count-1, float32 [count].

    -log(-log(1 - u)) with u on the grid (word + 1/2) / 2^32: small u, that is large noise, keep full precision.
    """
    u = (philox(seed, sample, position, count, device).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u.clamp_(max=1 - 2.0**-24)))


def sample_row(logits: torch.Tensor, row: SamplingRow, position: int, sample: int = 0) -> int:
    """The token at `position` from float32 logits [vocabulary]: divide by T, top_k, top_p, then argmax with noise."""
    if row.temperature == 0:
        return int(logits.argmax())
    scaled = logits / row.temperature
    if row.top_k and row.top_k < scaled.numel():
        scaled = keep_top_k(scaled, row.top_k)
    if row.top_p < 1:
        scaled = keep_top_p(scaled, row.top_p)
    return int((scaled + gumbel(row.seed, sample, position, scaled.numel(), scaled.device)).argmax())


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """All below the k-th largest become -inf; ties with it stay."""
    threshold = logits.topk(k).values[-1]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the smallest set of largest logits whose probability reaches p; ties with the last kept one stay."""
    ordered = logits.sort(descending=True).values
    before = ordered.softmax(-1).cumsum(-1).roll(1)
    before[0] = 0.0
    threshold = ordered[int((before < p).sum()) - 1]
    return logits.masked_fill(logits < threshold, -torch.inf)


@dataclass(frozen=True)
class Wanted:
    """A token whose log-probability was asked for: its row of logits, its id, and how many alternatives."""

    row: int
    token_id: int
    top: int


def token_logprobs(logits: torch.Tensor, wanted: list[Wanted]) -> list[TokenLogprobs]:
    """Log-probabilities under raw float32 logits [rows, vocabulary]; rank 1 is the argmax."""
    if not wanted:
        return []
    chosen = logits[[w.row for w in wanted]]
    total = chosen.logsumexp(-1, keepdim=True)
    ids = torch.tensor([w.token_id for w in wanted], device=logits.device)[:, None]
    own = chosen.gather(1, ids)
    ranks = (chosen > own).sum(-1).add(1).tolist()
    top = chosen.topk(min(max(w.top for w in wanted), chosen.shape[1]), dim=-1)
    logprobs, top_ids, top_logprobs = (own - total)[:, 0].tolist(), top.indices.tolist(), (top.values - total).tolist()
    return [
        TokenLogprobs(w.token_id, logprobs[i], ranks[i], top_ids[i][: w.top], top_logprobs[i][: w.top])
        for i, w in enumerate(wanted)
    ]
