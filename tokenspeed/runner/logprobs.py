"""Log-probabilities of chosen tokens and of the best alternatives, under the raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenspeed.contracts.step import TokenLogprobs
from tokenspeed.runner.tiles import TILE, Tiles, tile


@dataclass(frozen=True)
class Logprobs:
    """Of n tokens, on the device: their ids int64 [n], log-probabilities float32 [n], ranks int64 [n] (1 is the
    argmax), and the `top` best ids and log-probabilities [n, top], best first, the lowest id first among equals."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def to_structs(self, tops: Sequence[int]) -> list[TokenLogprobs]:
        """As contracts hold them, with as many alternatives as `tops` says for each. Waits for the device."""
        columns = (self.token_ids, self.logprobs, self.ranks, self.top_ids, self.top_logprobs)
        return [
            TokenLogprobs(token, logprob, rank, ids[:top], logprobs[:top])
            for token, logprob, rank, ids, logprobs, top in zip(*(c.tolist() for c in columns), tops, strict=True)
        ]


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, top: int) -> Logprobs:
    """Log-probabilities of one token per row of raw float32 logits [n, vocabulary], and of `top` alternatives."""
    logprobs = logits.log_softmax(-1)
    own = logits.gather(1, token_ids[:, None])
    ranks = (logits > own).sum(-1) + 1
    top_ids = _top_ids(tile(logits), min(top, logits.shape[1]))
    return Logprobs(
        token_ids, logprobs.gather(1, token_ids[:, None])[:, 0], ranks, top_ids, logprobs.gather(1, top_ids)
    )


def _top_ids(tiles: Tiles, k: int) -> torch.Tensor:
    """Ids of the k largest values, int64 [rows, k]: those of tiles with the k largest maxima hold them."""
    if k == 0:
        return tiles.numbers[:, :0]
    at = _top_places(tiles.maxima, tiles.numbers, min(k, tiles.maxima.shape[1]))
    values = tiles.take(at).flatten(1)
    ids = (tiles.numbers.gather(1, at)[:, :, None] * TILE + torch.arange(TILE, device=at.device)).flatten(1)
    return ids.gather(1, _top_places(values, ids, k))


def _top_places(values: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
    """Where the k largest float32 values lie, the lowest id first among equals; ids below 2^31."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: no negative zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ((ordered << 32) | (0x7FFFFFFF - ids)).topk(k).indices
