"""An executor that computes nothing: what remains of a step is the host's own work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenspeed.contracts.step import Pooling, ResultRow, StepPlan, StepResult

VOCAB_SIZE = 32_000
HIDDEN_SIZE = 8
"""Of the embeddings it makes up."""


@dataclass(frozen=True, slots=True)
class Done:
    """The handle of a step that is over."""

    step: StepResult

    def result(self) -> StepResult:
        """The result; never waits."""
        return self.step


def made_up(pooling: Pooling) -> bytes:
    """1, 2, 3 and so on, of an embedding HIDDEN_SIZE of them; a classifier has one label."""
    count = HIDDEN_SIZE if pooling.kind == "embedding" else len(pooling.token_ids) or 1
    return np.arange(1, count + 1, dtype="<f4").tobytes()


class NullExecutor:
    """Accepts any plan at once and samples one token per row that reaches the end: its position, modulo the vocabulary,
    from `first_token` on. What is pooled is 1, 2, 3 and so on.

    It trusts the plan: pages and grants are ignored. Only the lengths of its sequences are kept.
    """

    max_in_flight = 1

    def __init__(self, vocab_size: int = VOCAB_SIZE, first_token: int = 0) -> None:
        self._vocab_size, self._first_token = vocab_size, first_token
        self._computed: dict[int, int] = {}
        self._known: dict[int, int] = {}
        self._poolings: dict[int, Pooling] = {}

    def launch(self, plan: StepPlan) -> Done:
        """Run the step to its end."""
        for new in plan.delta.new:
            self._computed[new.slot], self._known[new.slot] = new.num_computed, len(new.token_ids)
            self._poolings.pop(new.slot, None)
            if new.pooling is not None:
                self._poolings[new.slot] = new.pooling
        computed, known, vocab_size, first = self._computed, self._known, self._vocab_size, self._first_token
        rows = []
        for row in plan.rows:
            slot = row.slot
            length = known[slot]
            end = min(computed[slot] + row.max_tokens, length)
            computed[slot] = end
            if end == length and slot in self._poolings:
                rows.append(ResultRow(slot, end, [], pooled=made_up(self._poolings[slot])))
            elif end == length:
                known[slot] = length + 1
                rows.append(ResultRow(slot, end, [first + length % vocab_size]))
            else:
                rows.append(ResultRow(slot, end, []))
        return Done(StepResult(plan.step_id, rows))

    def sleep(self) -> None:
        """Nothing to give back: there are no pages."""

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Forget the sequences."""
        self._computed.clear()
        self._known.clear()
