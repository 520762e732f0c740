"""`bench serve`: load on any endpoint of OpenAI's shape, in a closed loop or at Poisson times, and what it got."""

from __future__ import annotations

import asyncio
import itertools
import random
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import msgspec

from tokenspeed.bench.sse_client import Client, RequestFailed
from tokenspeed.contracts.errors import ConfigError


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        """Whether there is output in it. A completion's event without text has a token that has none, unless it is the
        end."""
        if self.text is not None:
            return self.text != "" or self.finish_reason is None
        return bool(self.delta)


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Cached | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_event = msgspec.json.Decoder(_Event)


@dataclass
class Measured:
    """One request. Times are perf_counter's; gaps lie between two events with output. Tokens are those of the usage."""

    sent: float = 0.0
    late: float = 0.0
    """Seconds between the time it was due and the time it was sent."""
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    _usage_seen: bool = False

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first output; infinite where none came."""
        return float("inf") if self.first is None else self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for a single token."""
        if self.first is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        """Seconds from sending to the last output."""
        return self.last - self.sent

    def on_event(self, now: float, data: bytes) -> None:
        """Take in the data of an event."""
        if data == b"[DONE]":
            return
        try:
            event = _event.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.error = f"not an event of this API: {error}"
            return
        if event.error is not None:
            self.error = f"error event: {event.error}"
        if event.usage is not None:
            self._count(event.usage)
        if any(event.choices):
            if self.first is None:
                self.first = now
            else:
                self.gaps.append(now - self.last)
            self.last = now

    def end(self) -> None:
        """The response ended as it should; now what it has to hold is checked."""
        if self.error is None and not self._usage_seen:
            self.error = "no usage in the stream: its tokens cannot be counted"
        if self.error is None and self.first is None:
            self.error = "no output"

    def _count(self, usage: _Usage) -> None:
        self._usage_seen = True
        self.prompt_tokens, self.output_tokens = usage.prompt_tokens, usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            self.cached_tokens = usage.prompt_tokens_details.cached_tokens or 0


@dataclass(frozen=True)
class Load:
    """How requests arrive: `concurrency` always under way, or `rate` per second at Poisson times. One of the two."""

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ConfigError("give one of --concurrency and --rate")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"--concurrency must be at least 1, got {self.concurrency}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ConfigError(f"--rate must be above 0, got {self.rate}")

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g} req/s, Poisson"


@dataclass(frozen=True)
class Run:
    """A finished load. cpu_s: processor time that the generator itself took."""

    load: Load
    requests: list[Measured]
    duration: float
    cpu_s: float


async def first_model(client: Client) -> str:
    """The name of the first model that the endpoint lists. Raises ConfigError where it cannot be asked."""

    place = f"{client.endpoint.host}:{client.endpoint.port}"
    try:
        listed = msgspec.json.decode(await client.get("/models"), type=_Models).data
    except (OSError, RequestFailed, msgspec.MsgspecError) as error:
        raise ConfigError(f"{place} does not list its models: {error}; name one with --model") from None
    if not listed:
        raise ConfigError(f"{place} lists no model")
    return listed[0].id


async def drive(
    client: Client, path: str, bodies: Iterable[bytes], load: Load, *, timeout: float = 600.0, seed: int = 0
) -> Run:
    """Send every body under a load, and measure each request. Nothing is raised for a request that fails: it says so.

    timeout: seconds for one request. seed: of the arrival times.
    """
    requests = [client.endpoint.request("POST", path, body) for body in bodies]
    before, started = _cpu_s(), perf_counter()
    if load.concurrency is not None:
        measured = await _closed_loop(client, iter(requests), load.concurrency, timeout)
    else:
        assert load.rate is not None
        measured = await _poisson(client, requests, load.rate, timeout, random.Random(seed))
    return Run(load, measured, perf_counter() - started, _cpu_s() - before)


async def _closed_loop(client: Client, requests: Iterator[bytes], concurrency: int, timeout: float) -> list[Measured]:
    measured: list[Measured] = []

    async def worker() -> None:
        for request in requests:
            result = Measured()
            measured.append(result)
            await _measure(client, request, result, timeout)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return measured


async def _poisson(
    client: Client, requests: list[bytes], rate: float, timeout: float, generator: random.Random
) -> list[Measured]:
    measured, tasks = [Measured() for _ in requests], []
    gaps = (generator.expovariate(rate) for _ in requests)
    started = perf_counter()
    for request, result, due in zip(requests, measured, itertools.accumulate(gaps), strict=True):
        await asyncio.sleep(max(0.0, started + due - perf_counter()))
        result.late = perf_counter() - started - due
        tasks.append(asyncio.ensure_future(_measure(client, request, result, timeout)))
    await asyncio.gather(*tasks)
    return measured


async def _measure(client: Client, request: bytes, result: Measured, timeout: float) -> None:
    result.sent = perf_counter()
    try:
        async with asyncio.timeout(timeout):
            await client.stream(request, result.on_event)
        result.end()
    except TimeoutError:
        result.error = f"no end within {timeout:g} s"
    except (OSError, RequestFailed) as error:
        result.error = result.error or str(error)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
