"""Results in the shapes of vLLM's offline API, built up from updates."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokenspeed.contracts.errors import ParameterError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import RequestOutputKind
from tokenspeed.contracts.step import TokenLogprobs
from tokenspeed.engine.stop import StopMatch, StopMatcher
from tokenspeed.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token, its rank (1 is the argmax), and its text."""

    logprob: float
    rank: int
    decoded_token: str


TokenAlternatives = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One completion. `logprobs`: per token, itself and its alternatives by id. `stop_reason`: the stop string or stop
    id that ended it; None for eos."""

    index: int
    pieces: list[str] = field(default_factory=list, repr=False)
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenAlternatives] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        """The text so far. Joined when it is asked for, so that growing it costs the same for every token."""
        if len(self.pieces) > 1:
            self.pieces[:] = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Monotonic seconds. num_tokens: of the longest sample, once all have ended."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    queue_s: float | None = None
    """Seconds that it waited before the engine fed it; None until that is known."""
    num_tokens: int = 0

    def timings(self, num_tokens: int) -> dict[str, float]:
        """ttft_ms, which is queue_ms and prefill_ms together; tpot_ms from two tokens on."""
        if self.first_token_time is None or self.finished_time is None:
            return {}
        timings = {"ttft_ms": 1e3 * (self.first_token_time - self.arrival_time)}
        if self.queue_s is not None:
            timings["queue_ms"] = 1e3 * self.queue_s
            timings["prefill_ms"] = timings["ttft_ms"] - timings["queue_ms"]
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
    pooled: npt.NDArray[np.float32] | None = None
    """What it gave in place of tokens; see `contracts.step.Pooling`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What one update brought.

    shown: what the request's output_kind shows of it: the output so far (CUMULATIVE), one with the new text, ids and
    log-probabilities of the updated sample alone (DELTA), the whole at the end (FINAL_ONLY); None for nothing.
    text: what the update added to the sample's text. abort: a stop string ended the sample, and the engine must abort
    the sequence; what it still says about it is passed over.
    """

    shown: RequestOutput | None
    text: str = ""
    abort: bool = False


class OutputBuilder:
    """Turns the updates of one request into its output, text included."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer | None) -> None:
        """Raises ParameterError for stop strings without a tokenizer."""
        params = request.params
        if params.stop and tokenizer is None:
            raise ParameterError("stop needs a tokenizer, and this model has none: use stop_token_ids")
        self._kind = params.output_kind
        self._tokenizer = tokenizer
        self._samples = [Sample(index, request, tokenizer) for index in range(params.n)]
        self._num_running = params.n
        self._num_prompt_logprobs_shown = 0
        self.output = RequestOutput(
            request.request_id,
            prompt,
            request.prompt_token_ids,
            [sample.completion for sample in self._samples],
            RequestMetrics(time.perf_counter()),
        )
        """Everything so far, of all samples."""
        if params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None]

    def update(self, update: SequenceUpdate) -> Progress:
        """Take in one update."""
        sample, output = self._samples[update.index], self.output
        if sample.completion.finished():
            return Progress(None)
        if update.new_token_ids and output.metrics.first_token_time is None:
            output.metrics.first_token_time = time.perf_counter()
        if update.pooled:
            output.pooled = np.frombuffer(update.pooled, "<f4")
        if update.index == 0:
            output.num_cached_tokens = update.num_cached_tokens
            if output.prompt_logprobs is not None:
                output.prompt_logprobs += [self._alternatives(found) for found in update.prompt_logprobs]
        text, count, stopped = sample.take(update)
        logprobs = [self._alternatives(found) for found in update.logprobs[:count]]
        sample.add_logprobs(logprobs, update.logprobs[:count])
        if sample.completion.finished():
            self._num_running -= 1
            if self._num_running == 0:
                output.finished, output.metrics.finished_time = True, time.perf_counter()
                output.metrics.num_tokens = max(len(each.completion.token_ids) for each in self._samples)
        return Progress(self._shown(sample, text, update.new_token_ids[:count], logprobs), text, stopped)

    def plain_sample(self) -> Sample | None:
        """The one sample, where its updates may bring nothing but text: for `Sample.take_plain`."""
        return self._samples[0] if len(self._samples) == 1 and self._samples[0].plain else None

    def delta(self, text: str, token_ids: list[int]) -> RequestOutput:
        """What `take_plain` has taken, as an output."""
        return self._new(CompletionOutput(0, [text], token_ids), None)

    def abort_updates(self) -> list[SequenceUpdate]:
        """What ends every sample that still runs, where it is."""
        output = self.output
        return [
            SequenceUpdate(
                request_id=output.request_id,
                index=completion.index,
                finish_reason="abort",
                num_cached_tokens=output.num_cached_tokens,
            )
            for completion in output.outputs
            if not completion.finished()
        ]

    def _shown(
        self, sample: Sample, text: str, token_ids: list[int], logprobs: list[TokenAlternatives]
    ) -> RequestOutput | None:
        whole, completion = self.output, sample.completion
        if self._kind is RequestOutputKind.FINAL_ONLY:
            return whole if whole.finished else None
        new_prompt_logprobs = (whole.prompt_logprobs or [])[self._num_prompt_logprobs_shown :]
        if not (text or token_ids or new_prompt_logprobs or completion.finished()):
            return None
        if self._kind is RequestOutputKind.CUMULATIVE:
            return whole
        self._num_prompt_logprobs_shown += len(new_prompt_logprobs)
        new = CompletionOutput(
            completion.index,
            [text],
            token_ids,
            completion.cumulative_logprob,
            None if completion.logprobs is None else logprobs,
            completion.finish_reason,
            completion.stop_reason,
        )
        return self._new(new, new_prompt_logprobs or None)

    def _new(
        self, completion: CompletionOutput, prompt_logprobs: list[TokenAlternatives | None] | None
    ) -> RequestOutput:
        whole = self.output
        return RequestOutput(
            whole.request_id,
            whole.prompt,
            whole.prompt_token_ids,
            [completion],
            whole.metrics,
            prompt_logprobs,
            whole.finished,
            whole.num_cached_tokens,
        )

    def _alternatives(self, found: TokenLogprobs) -> TokenAlternatives:
        entries = {found.token_id: self._logprob(found.token_id, found.logprob, found.rank)}
        for rank, (token, logprob) in enumerate(zip(found.top_ids, found.top_logprobs, strict=True), start=1):
            entries.setdefault(token, self._logprob(token, logprob, rank))
        return entries

    def _logprob(self, token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, self._tokenizer.token_text(token) if self._tokenizer else "")


class Sample:
    """One of a request's samples: its completion, and the end of its text that may not be shown yet."""

    __slots__ = ("_detokenizer", "_held", "_matcher", "_min_tokens", "_show_stop_token", "completion", "plain")

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.completion = CompletionOutput(index)
        if params.logprobs is not None:
            self.completion.logprobs, self.completion.cumulative_logprob = [], 0.0
        self._detokenizer = (
            tokenizer.detokenizer(request.prompt_token_ids, params.skip_special_tokens)
            if tokenizer is not None and params.detokenize
            else None
        )
        self._matcher = StopMatcher(params.stop_strings, params.include_stop_str_in_output) if params.stop else None
        self._show_stop_token = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._held = ""
        self.plain = self._detokenizer is not None and self._matcher is None and params.logprobs is None
        """Whether `take_plain` may be asked."""

    def take_plain(self, update: SequenceUpdate) -> str | None:
        """Take in an update that brings nothing but tokens to a sample that has begun and goes on, and give their text;
        None, and nothing taken, for any other."""
        ids, completion = update.new_token_ids, self.completion
        if not ids or update.finish_reason is not None or update.logprobs or update.prompt_logprobs:
            return None
        if not completion.token_ids or completion.finish_reason is not None or self._detokenizer is None:
            return None
        text = self._detokenizer.push(ids)
        completion.token_ids += ids
        completion.pieces.append(text)
        return text

    def take(self, update: SequenceUpdate) -> tuple[str, int, bool]:
        """Add tokens and text. Returns the new text, how many of the update's tokens belong to the sample, and whether
        a stop string ended it there."""
        ids, completion = update.new_token_ids, self.completion
        num_texts = len(ids)
        if update.finish_reason == "stop" and not self._show_stop_token:
            num_texts -= 1  # as in vLLM, the text of an eos or stop id is left out
        text, count, match = self._decode(ids[: max(0, num_texts)])
        if match is not None:
            ids = ids[:count]
            completion.finish_reason, completion.stop_reason = "stop", match.stop
        elif update.finish_reason is not None:
            text += self._held + (self._detokenizer.finish() if self._detokenizer is not None else "")
            completion.finish_reason, completion.stop_reason = update.finish_reason, update.stop_reason
        completion.token_ids += ids
        if text:
            completion.pieces.append(text)
        return text, len(ids), match is not None

    def add_logprobs(self, logprobs: list[TokenAlternatives], found: list[TokenLogprobs]) -> None:
        """Add those of the tokens just taken."""
        completion = self.completion
        if completion.logprobs is not None and completion.cumulative_logprob is not None:
            completion.logprobs += logprobs
            completion.cumulative_logprob += sum(entry.logprob for entry in found)

    def _decode(self, ids: list[int]) -> tuple[str, int, StopMatch | None]:
        """Text that may be shown, and where a stop string ended it: after how many of the ids, and which."""
        detokenizer, matcher = self._detokenizer, self._matcher
        if detokenizer is None:
            return "", len(ids), None
        if matcher is None:
            return detokenizer.push(ids), len(ids), None
        text, num_tokens = self._held, len(self.completion.token_ids)
        for count, token in enumerate(ids, start=1):
            piece = detokenizer.push((token,))
            match = matcher.push(piece, ignored=num_tokens + count <= self._min_tokens)
            if match is not None:
                return text + piece[: match.cut] if match.cut >= 0 else text[: match.cut], count, match
            text += piece
        shown = len(text) - matcher.held
        self._held = text[shown:]
        return text[:shown], len(ids), None
