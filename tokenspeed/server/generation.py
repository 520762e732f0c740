"""The engine requests behind one HTTP request: submitted together, read as one stream, ended together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import TypeVar

from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.output import RequestOutput
from tokenspeed.server.client import client_of_request
from tokenspeed.server.engine import Engine, Stream
from tokenspeed.server.errors import ApiError
from tokenspeed.server.metrics import RequestMeter, ServerMetrics
from tokenspeed.server.summary import RequestSummary

Item = TypeVar("Item")


class Generation:
    """One engine request per prompt, as a context manager: what has not finished when it ends is aborted.

    Raises, on entry, the engine's refusal of any prompt, and then leaves none of them behind.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: ServerMetrics,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        arrival = time.perf_counter()
        self._engine, self._params = engine, params
        self._prompts = prompts
        self._request_id, self._priority, self._cache_salt = request_id, priority, cache_salt
        client = client_of_request.get()
        self._meters = [
            RequestMeter(metrics, arrival, RequestSummary(f"{request_id}-{number}", prompt, params.n, client))
            for number, prompt in enumerate(prompts)
        ]
        self._streams: list[Stream] = []

    def __enter__(self) -> Generation:
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
            self._abort()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abort()
        failed = kind is not None and issubclass(kind, Exception)
        now = time.perf_counter()
        for meter in self._meters:
            meter.end("error" if failed else "abort", now)

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(number of the prompt, what is new of it) as it comes. Raises what ends a request early: an error of
        `contracts.errors`, or ApiError where a shutdown aborted it."""
        numbered = _only(self._streams[0]) if len(self._streams) == 1 else _merge(self._streams)
        async for number, output in numbered:
            self._meters[number].observe(output, time.perf_counter())
            if any(completion.finish_reason == "abort" for completion in output.outputs):
                raise ApiError(503, "the request was aborted: the server is shutting down", code="shutting_down")
            yield number, output

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
