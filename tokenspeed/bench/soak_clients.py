"""The clients of the soak: they send what `soak_traffic` draws, check the answers and note how each one ended."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Any

import msgspec

from tokenspeed.bench.serve import Measured
from tokenspeed.bench.soak_traffic import Ask, Traffic
from tokenspeed.bench.sse_client import Client, RequestFailed

REQUEST_S = 180.0
"""A request that takes longer has failed."""
REFERENCE_S = 20.0
"""Seconds between two requests whose answer is known."""
RETRY_S = 1.0
"""A client that was refused because too many wait comes again after this time, as the answer says."""
_STATUS = re.compile(r"HTTP (\d+):")


@dataclass(frozen=True)
class Outcome:
    """How a request ended. label: answered, left, 429, or the status that was right; `unexpected`: what was wrong."""

    kind: str
    label: str
    ended: float
    """monotonic seconds"""
    ttft: float | None = None
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    unexpected: str | None = None


class Clients:
    """Some clients that ask without a pause, one that comes with bursts, and one that knows its answer.

    outcomes: of all requests, in the order of their ends.
    """

    def __init__(self, client: Client, traffic: Traffic, at_once: int, burst: int, burst_s: float) -> None:
        self._client, self._traffic = client, traffic
        self._at_once, self._burst, self._burst_s = at_once, burst, burst_s
        self._answer: Any = None
        self.outcomes: list[Outcome] = []

    async def run(self, seconds: float) -> None:
        """Ask for this long, then let what is under way end."""
        end = monotonic() + seconds
        await asyncio.gather(*(self._ask_on(end) for _ in range(self._at_once)), self._bursts(end), self._same(end))

    async def _ask_on(self, end: float) -> None:
        while monotonic() < end:
            await self._perform(self._traffic.next())
            if self.outcomes[-1].label == "429":
                await asyncio.sleep(RETRY_S)

    async def _bursts(self, end: float) -> None:
        while (rest := end - monotonic()) > 0:
            await asyncio.gather(*(self._perform(ask) for ask in self._traffic.burst(self._burst)))
            await asyncio.sleep(min(self._burst_s, rest))

    async def _same(self, end: float) -> None:
        while (rest := end - monotonic()) > 0:
            await self._perform(self._traffic.reference())
            await asyncio.sleep(min(REFERENCE_S, rest))

    async def _perform(self, ask: Ask) -> None:
        measured = Measured()
        label, unexpected = "answered", None
        try:
            async with asyncio.timeout(REQUEST_S):
                label, unexpected = await self._exchange(ask, measured)
        except RequestFailed as error:
            found = _STATUS.match(str(error))
            label = found[1] if found else "failed"
            unexpected = None if label in ("429", str(ask.status)) else str(error)
        except TimeoutError:
            label, unexpected = "failed", f"no end within {REQUEST_S:g} s"
        except OSError as error:
            label, unexpected = "failed", str(error)
        timed = label == "answered" and measured.first is not None
        self.outcomes.append(
            Outcome(
                ask.kind,
                label,
                monotonic(),
                measured.ttft if timed else None,
                measured.gaps if timed else [],
                measured.output_tokens,
                unexpected,
            )
        )

    async def _exchange(self, ask: Ask, measured: Measured) -> tuple[str, str | None]:
        """Label, and what was wrong."""
        request = self._client.endpoint.request("POST", ask.path, ask.body)
        if ask.leave_after is not None:
            return await self._leave(request, ask.leave_after)
        if ask.stream:
            measured.sent = perf_counter()
            await self._client.stream(request, measured.on_event)
            measured.end()
            if measured.error == "no output":  # stopped before anything could be shown
                measured.error = None
            return "answered", measured.error or _too_many(ask, measured.output_tokens)
        body = msgspec.json.decode(await self._client.post(request))
        measured.output_tokens = body["usage"]["completion_tokens"]
        return "answered", self._check(ask, body)

    async def _leave(self, request: bytes, after: int) -> tuple[str, str | None]:
        count, enough = 0, asyncio.Event()

        def on_event(now: float, data: bytes) -> None:
            nonlocal count
            count += 1
            if count >= after:
                enough.set()

        asking = asyncio.ensure_future(self._client.stream(request, on_event))
        if after:
            waiting = asyncio.ensure_future(enough.wait())
            await asyncio.wait({asking, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
        else:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait({asking})
        if not asking.cancelled() and (error := asking.exception()) is not None:
            raise error
        return "left", None

    def _check(self, ask: Ask, body: Any) -> str | None:
        if ask.status != 200:
            return f"answered, a {ask.status} was due"
        if len(body["choices"]) != ask.choices:
            return f"{len(body['choices'])} choices, asked for {ask.choices}"
        if ask.kind == "reference":
            answer = [choice["text"] for choice in body["choices"]]
            self._answer = answer if self._answer is None else self._answer
            if answer != self._answer:
                return f"the same request got {answer} and before {self._answer}"
        return _too_many(ask, body["usage"]["completion_tokens"])


def _too_many(ask: Ask, tokens: int) -> str | None:
    return f"{tokens} tokens, asked for {ask.most_tokens}" if tokens > ask.most_tokens else None
