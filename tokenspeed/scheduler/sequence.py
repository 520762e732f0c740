"""A request on its way through the engine, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tokenspeed.cache.manager import BlockTable
from tokenspeed.contracts.request import Request
from tokenspeed.contracts.step import SamplingRow
from tokenspeed.scheduler.lifecycle import Status, check_transition


class Finish(NamedTuple):
    """Why a sequence ended, in the terms of SequenceUpdate."""

    reason: str
    stop_reason: int | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """Known tokens (prompt, then sampled ones), of which the first `num_computed` have their KV in the pages."""

    request: Request
    token_ids: list[int]
    max_len: int
    """Tokens, prompt included, at which it ends with "length"."""
    table: BlockTable
    status: Status = Status.WAITING
    slot: int = -1
    num_computed: int = 0
    num_cached: int = 0
    """Prompt tokens found in the prefix cache."""
    num_granted: int = 0
    """Pages of `table` that the executor knows."""

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    def move(self, status: Status) -> None:
        check_transition(self.status, status)
        self.status = status

    def accept(self, token_ids: list[int]) -> tuple[list[int], Finish | None]:
        """Append sampled tokens up to the one that ends it. Returns those appended, and why it ended or None."""
        for count, token_id in enumerate(token_ids, start=1):
            self.token_ids.append(token_id)
            if (finish := self._finish_at(token_id)) is not None:
                return token_ids[:count], finish
        return token_ids, None

    def _finish_at(self, token_id: int) -> Finish | None:
        """The order is vLLM's: eos, stop ids, length."""
        params = self.request.params
        if token_id in self.request.eos_token_ids and not params.ignore_eos:
            return Finish("stop")
        if token_id in params.stop_token_ids:
            return Finish("stop", token_id)
        if len(self.token_ids) >= self.max_len:
            return Finish("length")
        return None


def sampling_row(request: Request) -> SamplingRow:
    params = request.params
    return SamplingRow(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=request.seed,
        logprobs=-1 if params.logprobs is None else params.logprobs,
        prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
    )
