"""An executor that computes nothing: what remains of a step is the host's own work."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.contracts.step import ResultRow, StepPlan, StepResult

VOCAB_SIZE = 32_000


@dataclass(frozen=True, slots=True)
class Done:
    """The handle of a step that is over."""

    step: StepResult

    def result(self) -> StepResult:
        """The result; never waits."""
        return self.step


class NullExecutor:
    """Accepts any plan at once and samples one token per row that reaches the end: its position, modulo the vocabulary,
    from `first_token` on.

    It trusts the plan: pages and grants are ignored. Only the lengths of its sequences are kept.
    """

    max_in_flight = 1

    def __init__(self, vocab_size: int = VOCAB_SIZE, first_token: int = 0) -> None:
        self._vocab_size, self._first_token = vocab_size, first_token
        self._computed: dict[int, int] = {}
        self._known: dict[int, int] = {}

    def launch(self, plan: StepPlan) -> Done:
        """Run the step to its end."""
        for new in plan.delta.new:
            self._computed[new.slot], self._known[new.slot] = new.num_computed, len(new.token_ids)
        computed, known, vocab_size, first = self._computed, self._known, self._vocab_size, self._first_token
        rows = []
        for row in plan.rows:
            slot = row.slot
            length = known[slot]
            end = min(computed[slot] + row.max_tokens, length)
            computed[slot] = end
            if end == length:
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
