"""`bench serve`: load on any endpoint of OpenAI's shape, in a closed loop or at times that do not wait for answers."""

from __future__ import annotations

import asyncio
import random
import resource
from collections.abc import Awaitable, Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter

import msgspec

from tokenspeed.bench.arrivals import Load
from tokenspeed.bench.measured import Answer, Measured
from tokenspeed.bench.sse_client import Client, RequestFailed
from tokenspeed.contracts.errors import ConfigError

__all__ = ["Load", "Measured", "Part", "Run", "Sender", "drive", "first_model", "send_all"]


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(frozen=True)
class Part:
    """What belongs together in a load, such as all second turns. gaps: those between outputs that count in it, s."""

    name: str
    requests: list[Measured]
    gaps: list[float]

    @classmethod
    def of(cls, name: str, requests: list[Measured]) -> Part:
        """With all gaps of these requests that did not fail."""
        return cls(name, requests, [gap for each in requests if each.error is None for gap in each.gaps])


@dataclass(frozen=True)
class Run:
    """A finished load. load: how requests arrived, in words. cpu_s: processor time that the generator itself took.

    mixed: its requests are of kinds too different for common latencies; those of the parts say more.
    """

    load: str
    requests: list[Measured]
    duration: float
    cpu_s: float
    parts: list[Part] = field(default_factory=list)
    mixed: bool = False


@dataclass(frozen=True)
class Sender:
    """Sends bodies to a route. timeout: seconds for one request. Nothing is raised for one that fails: it says so.

    keep_answers: keep what was answered, and when.
    """

    client: Client
    path: str
    timeout: float = 600.0
    keep_answers: bool = False

    def request(self, body: bytes) -> bytes:
        """The bytes to send."""
        return self.client.endpoint.request("POST", self.path, body)

    async def send(self, request: bytes, result: Measured) -> None:
        """Send what `request` made, and measure it."""
        if self.keep_answers and result.answer is None:
            result.answer = Answer()
        result.sent = perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                await self.client.stream(request, result.on_event)
            result.end()
        except TimeoutError:
            result.error = f"no end within {self.timeout:g} s"
        except (OSError, RequestFailed) as error:
            result.error = result.error or str(error)
        result.ended = perf_counter()


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
    """`send_all` to a route. timeout: seconds for one request."""
    return await send_all(Sender(client, path, timeout), bodies, load, seed=seed)


async def send_all(sender: Sender, bodies: Iterable[bytes], load: Load, *, seed: int = 0) -> Run:
    """Send every body under a load, and measure each; the requests of the run are in the order of the bodies.

    All bodies are made before the first is sent. seed: of the arrival times.
    """
    requests = [sender.request(body) for body in bodies]
    if load.concurrency is not None:
        return await timed(str(load), closed_loop(sender, iter(requests), load.concurrency))
    return await timed(str(load), open_loop(sender, requests, load, random.Random(seed)))


async def timed(load: str, work: Awaitable[list[Measured]]) -> Run:
    """What some work measured, with how long it took and the processor time that it used."""
    before, started = _cpu_s(), perf_counter()
    measured = await work
    return Run(load, measured, perf_counter() - started, _cpu_s() - before)


async def closed_loop(sender: Sender, requests: Iterator[bytes], concurrency: int) -> list[Measured]:
    """Send the next one whenever fewer than `concurrency` are under way."""
    measured: list[Measured] = []

    async def worker() -> None:
        for request in requests:
            result = Measured()
            measured.append(result)
            await sender.send(request, result)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return measured


async def open_loop(sender: Sender, requests: list[bytes], load: Load, generator: random.Random) -> list[Measured]:
    """Send each when it is due, whatever has become of those before; a bound of the load may hold it back."""
    measured, tasks = [Measured() for _ in requests], []
    places = asyncio.Semaphore(load.max_concurrency or len(requests))

    async def send(request: bytes, result: Measured) -> None:
        asked = perf_counter() if places.locked() else None
        async with places:
            if asked is not None:
                result.waited = perf_counter() - asked
            await sender.send(request, result)

    started = perf_counter()
    for request, result, due in zip(requests, measured, load.due(len(requests), generator), strict=True):
        result.due = started + due
        await asyncio.sleep(max(0.0, result.due - perf_counter()))
        tasks.append(asyncio.ensure_future(send(request, result)))
    await asyncio.gather(*tasks)
    return measured


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
