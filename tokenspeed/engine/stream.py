"""The outputs of one request on their way to its reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import RequestOutputKind
from tokenspeed.engine.output import CompletionOutput, OutputBuilder, RequestOutput, Sample
from tokenspeed.tokenizer.base import Tokenizer

PlainSink = Callable[[str, int], bool]
"""Takes a text and how many tokens it is of, at once; False where it cannot now."""


class Outbox:
    """What the engine has given for a request and its reader has not taken: one output at most, into which later ones
    are merged."""

    __slots__ = ("_builder", "_error", "_merges", "_plain", "_reader", "_sink", "_waiting")

    def __init__(self, request: Request, shown_id: str, prompt: str | None, tokenizer: Tokenizer | None) -> None:
        """shown_id: the id that outputs bear, where the engine knows the request by another one."""
        self._builder = OutputBuilder(request, prompt, tokenizer)
        self._builder.output.request_id = shown_id
        self._merges = request.params.output_kind is RequestOutputKind.DELTA
        self._waiting: RequestOutput | None = None
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._sink: PlainSink | None = None
        self._plain: Sample | None = None
        """What gives the sink its text."""

    @property
    def output(self) -> RequestOutput:
        """Everything so far, of all samples."""
        return self._builder.output

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self._error is not None or self._builder.output.finished

    def push_to(self, sink: PlainSink) -> None:
        """See `RequestStream.push_to`."""
        self._sink, self._plain = sink, self._builder.plain_sample()

    def push(self, update: SequenceUpdate) -> bool:
        """Take in plain text while the reader waits, and hand it to the sink: without waking the reader, which costs as
        much as all the rest of a token's way. False, and nothing taken, where that is not all there is to it."""
        sample, sink = self._plain, self._sink
        if sample is None or sink is None or self._reader is None or self._waiting is not None:
            return False
        text = sample.take_plain(update)
        if text is None:
            return False
        if not sink(text, len(update.new_token_ids)):
            self._hand_over(self._builder.delta(text, update.new_token_ids))
        return True

    def take(self, update: SequenceUpdate) -> bool:
        """Take in an update. Returns whether a stop string ended the sample, which the engine has to be told."""
        if self.push(update):
            return False
        progress = self._builder.update(update)
        if progress.shown is not None:
            self._hand_over(progress.shown)
        return progress.abort

    def abort(self) -> None:
        """End what still runs; the reader gets a last output that says so."""
        for update in self._builder.abort_updates():
            self.take(update)

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what is still to be read."""
        self._error = error
        self._wake()

    async def next(self) -> RequestOutput | None:
        """The next output; None after the last. Raises the error that ended the request. For one reader."""
        if self._waiting is None and not self.finished:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        waiting, self._waiting = self._waiting, None
        if waiting is None and self._error is not None:
            raise self._error.with_traceback(None)
        return waiting

    def _hand_over(self, output: RequestOutput) -> None:
        self._waiting = merged(self._waiting, output) if self._merges else output
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class RequestStream:
    """The outputs of one request, for one reader: `async for output in stream`.

    A slow reader gets several steps in one output. Leaving the loop, being cancelled in it, or dropping the stream
    aborts the request.
    """

    def __init__(self, outbox: Outbox, abort: Callable[[], None]) -> None:
        self._outbox = outbox
        self._abort = abort
        self._loop = asyncio.get_running_loop()

    @property
    def output(self) -> RequestOutput:
        """Everything so far, read or not, of all samples."""
        return self._outbox.output

    def __aiter__(self) -> RequestStream:
        return self

    def push_to(self, sink: PlainSink) -> None:
        """From now on hand plain text to `sink` while the reader waits, and the reader everything else: the first and
        the last of a sample, what has log-probabilities, what `sink` does not take, and all there is where there are
        several samples. For outputs in delta form."""
        self._outbox.push_to(sink)

    async def __anext__(self) -> RequestOutput:
        """Raises the error that ended the request: what the engine refused, EngineDeadError, EngineClosedError."""
        try:
            output = await self._outbox.next()
        except asyncio.CancelledError:
            self.abort()
            raise
        if output is None:
            raise StopAsyncIteration
        return output

    def abort(self) -> None:
        """End the request now; nothing happens when it has ended already. A reader still gets a last output, with the
        finish_reason "abort"."""
        self._abort()

    async def aclose(self) -> None:
        """The same as `abort`, for `contextlib.aclosing`."""
        self._abort()

    def __del__(self) -> None:
        # Garbage may be collected in any thread, and after the loop has ended.
        if not self._outbox.finished:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._abort)


def merged(older: RequestOutput | None, newer: RequestOutput) -> RequestOutput:
    """Two deltas of one request as one; `older` is used up."""
    if older is None:
        return newer
    found = {completion.index: completion for completion in older.outputs}
    for completion in newer.outputs:
        if completion.index in found:
            _extend(found[completion.index], completion)
        else:
            older.outputs.append(completion)
    if newer.prompt_logprobs:
        older.prompt_logprobs = (older.prompt_logprobs or []) + newer.prompt_logprobs
    older.finished, older.num_cached_tokens = newer.finished, newer.num_cached_tokens
    return older


def _extend(older: CompletionOutput, newer: CompletionOutput) -> None:
    older.pieces += newer.pieces
    older.token_ids += newer.token_ids
    if older.logprobs is not None and newer.logprobs is not None:
        older.logprobs += newer.logprobs
    older.cumulative_logprob = newer.cumulative_logprob
    older.finish_reason, older.stop_reason = newer.finish_reason, newer.stop_reason
