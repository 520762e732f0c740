"""The engine requests behind one HTTP request: submitted together, read as one stream, ended together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from time import perf_counter
from types import TracebackType
from typing import TypeVar

from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import Pooling
from tokenspeed.engine.output import RequestOutput
from tokenspeed.server.client import caller_of_request
from tokenspeed.server.direct import WriteText
from tokenspeed.server.engine import Engine, Stream
from tokenspeed.server.errors import ApiError
from tokenspeed.server.limits import Admission
from tokenspeed.server.metrics import RequestMeter, ServerMetrics
from tokenspeed.server.summary import RequestSummary

Item = TypeVar("Item")


class Generation:
    """One engine request per prompt, as a context manager: what has not finished when it ends is aborted.

    Raises, on entry, ApiError 429 while too many wait, or the engine's refusal of any prompt, and then leaves none of
    them behind.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: ServerMetrics,
        admission: Admission,
        prompts: Sequence[list[int]],
        params: SamplingParams | Pooling,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        arrival = perf_counter()
        self._engine, self._params = engine, params
        self._prompts, self._samples = prompts, params.n if isinstance(params, SamplingParams) else 1
        self._request_id, self._priority, self._cache_salt = request_id, priority, cache_salt
        caller = caller_of_request.get()
        self._meters = [
            RequestMeter(metrics, arrival, RequestSummary(f"{request_id}-{number}", prompt, self._samples, caller))
            for number, prompt in enumerate(prompts)
        ]
        self._streams: list[Stream] = []
        self._admission = admission
        self._unanswered = set[int]()
        self._clock: asyncio.TimerHandle | None = None
        self._expired = False

    def __enter__(self) -> Generation:
        self._admission.check(self._engine)
        self._unanswered = set(range(len(self._prompts)))
        self._admission.unanswered += self._samples * len(self._prompts)
        try:
            for number, prompt in enumerate(self._prompts):
                self._streams.append(
                    self._engine.submit(
                        prompt,
                        self._params,
                        request_id=f"{self._request_id}-{number}",
                        priority=self._priority,
                        cache_salt=self._cache_salt,
                    )
                )
        except BaseException:
            self._leave()
            raise
        timeout = self._admission.limits.request_timeout
        if timeout is not None:
            self._clock = asyncio.get_running_loop().call_later(timeout, self._expire)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()
        failed = kind is not None and issubclass(kind, Exception)
        now = perf_counter()
        for meter in self._meters:
            meter.end("error" if failed else "abort", now)

    @property
    def request_id(self) -> str:
        """Of the HTTP request; each prompt adds its number."""
        return self._request_id

    @property
    def num_prompts(self) -> int:
        """Engine requests behind this one."""
        return len(self._prompts)

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(number of the prompt, what is new of it) as it comes. Raises what ends a request early: an error of
        `contracts.errors`, or ApiError where its time or a shutdown aborted it."""
        numbered = _only(self._streams[0]) if len(self._streams) == 1 else _merge(self._streams)
        async for number, output in numbered:
            self._meters[number].observe(output, perf_counter())
            if number in self._unanswered:
                self._answer(number)
            if any(completion.finish_reason == "abort" for completion in output.outputs):
                raise self._aborted()
            yield number, output

    @property
    def num_tokens(self) -> int:
        """What all its samples have given so far."""
        return sum(meter.num_tokens for meter in self._meters)

    def push(self, write: WriteText) -> None:
        """From now on hand text that needs no more than to be written to `write`, past `outputs`; nothing where there
        are several samples."""
        if len(self._streams) == 1 and self._samples == 1:
            self._streams[0].push_to(self._meters[0].metered(write))

    def _aborted(self) -> ApiError:
        if self._expired:
            limit = self._admission.limits.request_timeout
            return ApiError(504, f"the request was aborted: it took longer than {limit:g} s", code="timeout")
        return ApiError(503, "the request was aborted: the server is shutting down", code="shutting_down")

    def _answer(self, number: int) -> None:
        self._unanswered.remove(number)
        self._admission.unanswered -= self._samples

    def _leave(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
        for number in tuple(self._unanswered):
            self._answer(number)
        self._abort()

    def _expire(self) -> None:
        self._expired = True
        self._abort()

    def _abort(self) -> None:
        for stream in self._streams:
            stream.abort()


async def _only(stream: Stream) -> AsyncIterator[tuple[int, RequestOutput]]:
    async for output in stream:
        yield 0, output


async def _merge(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Outputs of several streams as they come; the first error ends all."""
    pending = {
        asyncio.ensure_future(_next(stream)): (number, stream) for number, stream in enumerate(map(aiter, streams))
    }
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, stream = pending.pop(task)
                output = task.result()
                if output is not None:
                    pending[asyncio.ensure_future(_next(stream))] = (number, stream)
                    yield number, output
    finally:
        for task in pending:
            task.cancel()


async def _next(stream: AsyncIterator[Item]) -> Item | None:
    return await anext(stream, None)
