"""Results in the shapes of vLLM's offline API, built up from updates."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.step import TokenLogprobs
from tokenspeed.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token, its rank (1 is the argmax), and its text."""

    logprob: float
    rank: int
    decoded_token: str


TokenAlternatives = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One completion. `logprobs`: per token, itself and its alternatives by id."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenAlternatives] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Monotonic seconds."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None

    def timings(self, num_tokens: int) -> dict[str, float]:
        """ttft_ms, and tpot_ms from two tokens on."""
        if self.first_token_time is None or self.finished_time is None:
            return {}
        timings = {"ttft_ms": 1e3 * (self.first_token_time - self.arrival_time)}
        if num_tokens > 1:
            timings["tpot_ms"] = 1e3 * (self.finished_time - self.first_token_time) / (num_tokens - 1)
        return timings


@dataclass
class RequestOutput:
    """A request and what it gave. `prompt_logprobs[0]` is None: nothing predicts the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[TokenAlternatives | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0


class OutputBuilder:
    """Turns the updates of one request into its output, text included."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(request.prompt_token_ids) if tokenizer else None
        completion = CompletionOutput(0)
        if request.params.logprobs is not None:
            completion.logprobs, completion.cumulative_logprob = [], 0.0
        self.output = RequestOutput(
            request.request_id, prompt, request.prompt_token_ids, [completion], RequestMetrics(time.perf_counter())
        )
        if request.params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None]

    def update(self, update: SequenceUpdate) -> str:
        """Take in one update; returns the text it completed."""
        output, completion = self.output, self.output.outputs[0]
        now = time.perf_counter()
        if update.new_token_ids and output.metrics.first_token_time is None:
            output.metrics.first_token_time = now
        output.num_cached_tokens = update.num_cached_tokens
        completion.token_ids += update.new_token_ids
        if completion.logprobs is not None and completion.cumulative_logprob is not None:
            completion.logprobs += [self._alternatives(found) for found in update.logprobs]
            completion.cumulative_logprob += sum(found.logprob for found in update.logprobs)
        if output.prompt_logprobs is not None:
            output.prompt_logprobs += [self._alternatives(found) for found in update.prompt_logprobs]
        text = self._detokenizer.push(update.new_token_ids) if self._detokenizer else ""
        if update.finish_reason is not None:
            text += self._detokenizer.finish() if self._detokenizer else ""
            completion.finish_reason, completion.stop_reason = update.finish_reason, update.stop_reason
            output.finished, output.metrics.finished_time = True, now
        completion.text += text
        return text

    def abort(self) -> None:
        """End the output where it is."""
        request_id, num_cached = self.output.request_id, self.output.num_cached_tokens
        self.update(SequenceUpdate(request_id=request_id, finish_reason="abort", num_cached_tokens=num_cached))

    def _alternatives(self, found: TokenLogprobs) -> TokenAlternatives:
        entries = {found.token_id: self._logprob(found.token_id, found.logprob, found.rank)}
        for rank, (token, logprob) in enumerate(zip(found.top_ids, found.top_logprobs, strict=True), start=1):
            entries.setdefault(token, self._logprob(token, logprob, rank))
        return entries

    def _logprob(self, token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, self._tokenizer.token_text(token) if self._tokenizer else "")
