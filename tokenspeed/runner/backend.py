"""What the executor asks of a backend: run a step's tokens through the model, then give logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from tokenspeed.runner.arena import Arena
from tokenspeed.runner.edits import SampledRow
from tokenspeed.runner.inputs import FedRow


class Backend(Protocol):
    """One model on one device, with its weights as its kernels read them."""

    @property
    def name(self) -> str: ...

    @property
    def weight_bytes(self) -> Mapping[str, float]:
        """Bytes of each weight that a decode step of one sequence reads."""
        ...

    @property
    def fallback_ops(self) -> Sequence[str]:
        """Ops for which a fast backend had no kernel, so that this slower one runs."""
        ...

    @property
    def max_passes(self) -> int:
        """Decode passes that `decode` can run in one call; 1 where it has no such way."""
        ...

    def bind(self, arena: Arena) -> None:
        """Use an arena's pages."""
        ...

    def body(self, fed: Sequence[FedRow]) -> None:
        """Run everything before the head for the tokens of a step; writes their KV."""
        ...

    def decode(self, fed: Sequence[FedRow], asks: Sequence[SampledRow], most: int) -> list[list[int]]:
        """Run a step of rows that feed one token each and are `drawn_plainly`, then up to `most` - 1 further passes,
        each with the tokens drawn in the one before. Ids per pass and row; the first pass that draws a stop id is the
        last, and so is one whose tokens cannot be told without logits: it is left out, so nothing may come."""
        ...

    def pick(self, rows: Sequence[int], asks: Sequence[SampledRow]) -> list[int] | None:
        """Token ids of some of the step's tokens, the same that sampling from their logits gives; asked only for rows
        that `drawn_plainly`. None where the backend has no shorter way than `logits`."""
        ...

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        """Float32 logits [rows, vocabulary] of some of the step's tokens, by their place in it; of a classifier [rows,
        labels]."""
        ...

    def hidden(self, rows: Sequence[int]) -> torch.Tensor:
        """Float32 hidden states [rows, hidden size] after the final norm of some of the step's tokens."""
        ...
