"""What sequences give in place of tokens: hidden states or logits of a step's rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate

import msgspec
import torch

from tokenspeed.contracts.step import Pooling, ResultRow
from tokenspeed.runner.inputs import FedRow

Rows = Callable[[list[int]], torch.Tensor]
"""Float32 [n, width] of n of a step's tokens, by their place in it."""


def with_pooled(
    fed: Sequence[FedRow], results: list[ResultRow], hidden: Rows, logits: Rows, at_once: int
) -> list[ResultRow]:
    """The results of a step, with what its rows pool. at_once: most tokens that `hidden` and `logits` are asked for.

    The mean of a prompt that comes in several steps is summed up in its slot, so none of it may come from a cache.
    """
    if all(row.slot.pooling is None for row in fed):
        return results
    starts = list(accumulate((row.count for row in fed), initial=0))
    ends = {at: starts[at + 1] - 1 for at, row in enumerate(fed) if row.pools}
    found: dict[int, torch.Tensor] = {}
    for kind, rows in (("embedding", hidden), ("score", logits)):
        places = {at: end for at, end in ends.items() if _pooling(fed[at]).kind == kind and not _pooling(fed[at]).mean}
        found |= zip(places, _by_parts(rows, list(places.values()), at_once), strict=True)
    means = [at for at, row in enumerate(fed) if row.slot.pooling is not None and row.slot.pooling.mean]
    _add_up(fed, [(at, place) for at in means for place in range(starts[at], starts[at + 1])], hidden, at_once)
    return [_with(result, fed[at], found.get(at)) for at, result in enumerate(results)]


def _pooling(row: FedRow) -> Pooling:
    assert row.slot.pooling is not None
    return row.slot.pooling


def _by_parts(rows: Rows, places: list[int], at_once: int) -> list[torch.Tensor]:
    return [each for first in range(0, len(places), at_once) for each in rows(places[first : first + at_once])]


def _add_up(fed: Sequence[FedRow], wanted: list[tuple[int, int]], hidden: Rows, at_once: int) -> None:
    """wanted: rows, in order, with places of theirs. In float64: how a prompt is cut must not show."""
    for first in range(0, len(wanted), at_once):
        part = wanted[first : first + at_once]
        values = hidden([place for _, place in part]).double()
        for at, count in Counter(at for at, _ in part).items():
            slot, own, values = fed[at].slot, values[:count].sum(0), values[count:]
            slot.summed = own if slot.summed is None else slot.summed + own


def _with(result: ResultRow, row: FedRow, found: torch.Tensor | None) -> ResultRow:
    if not row.pools:
        return result
    pooling = _pooling(row)
    if pooling.mean:
        assert row.slot.summed is not None
        found = row.slot.summed / row.slot.num_prompt
    assert found is not None
    values = found[pooling.token_ids] if pooling.token_ids else found
    return msgspec.structs.replace(result, pooled=values.float().cpu().numpy().astype("<f4").tobytes())
