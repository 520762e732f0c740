"""Rows of logits in tiles, with each tile's maximum: most of a vocabulary is read once and never again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE = 64
"""Tokens per tile of a whole row."""


@dataclass(frozen=True)
class Tiles:
    """Some tiles of each row: values [rows, n, width], their tile numbers [rows, n] in ascending order, and their
    maxima [rows, n]. A row with fewer than n tiles is filled up with tiles of -inf."""

    values: torch.Tensor
    numbers: torch.Tensor
    maxima: torch.Tensor

    def flat(self) -> torch.Tensor:
        """Values as [rows, n * width]."""
        return self.values.flatten(1)

    def take(self, at: torch.Tensor) -> torch.Tensor:
        """Values [rows, k, width] of the tiles at places [rows, k]."""
        return self.values.gather(1, at[:, :, None].expand(-1, -1, self.values.shape[2]))

    def split(self, width: int) -> Tiles:
        """The same values in smaller tiles, of a width that divides this one."""
        parts = self.values.shape[2] // width
        values = self.values.unflatten(2, (parts, width)).flatten(1, 2)
        numbers = self.numbers[:, :, None] * parts + torch.arange(parts, device=self.numbers.device)
        return Tiles(values, numbers.flatten(1), values.amax(-1))

    def first_argmax(self) -> torch.Tensor:
        """Token id of the largest value of each row, int64 [rows]; the lowest id among equals."""
        at = self.maxima.argmax(-1)[:, None]
        inside = self.take(at).argmax(-1)
        return (self.numbers.gather(1, at) * self.values.shape[2] + inside)[:, 0]

    def top_values(self, k: int) -> torch.Tensor:
        """The k largest values of each row, descending, [rows, k]; all of them where there are fewer.

        They lie in the k tiles of the largest maxima: each tile left out has k values that are no smaller beside it.
        """
        chosen = self.values
        if k < self.maxima.shape[1]:
            chosen = self.take(self.maxima.topk(k, sorted=False).indices)
        chosen = chosen.flatten(1)
        return chosen.topk(min(k, chosen.shape[1])).values

    def narrow(self, keep: torch.Tensor) -> Tiles:
        """The tiles that a bool [rows, n] names. Waits for the device: the result's size is read from it."""
        if keep.shape[0] == 1:
            (at,) = keep[0].nonzero(as_tuple=True)
            return Tiles(self.values[:, at], self.numbers[:, at], self.maxima[:, at]) if len(at) else self
        counts = keep.sum(-1)
        n = max(1, int(counts.max()))
        if n == keep.shape[1]:
            return self
        rows, at = keep.nonzero(as_tuple=True)
        index = keep.new_zeros((keep.shape[0], n), dtype=torch.int64)
        index[rows, (keep.cumsum(-1) - 1)[rows, at]] = at
        filler = torch.arange(n, device=keep.device) >= counts[:, None]
        return Tiles(
            self.take(index).masked_fill_(filler[:, :, None], -torch.inf),
            self.numbers.gather(1, index),
            self.maxima.gather(1, index).masked_fill_(filler, -torch.inf),
        )


def tile(logits: torch.Tensor) -> Tiles:
    """All tiles of float32 logits [rows, vocabulary]; a view where the vocabulary is a multiple of TILE."""
    missing = -logits.shape[1] % TILE
    if missing:
        logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    values = logits.unflatten(1, (-1, TILE))
    numbers = torch.arange(values.shape[1], device=logits.device).expand(values.shape[:2])
    return Tiles(values, numbers, values.amax(-1))
