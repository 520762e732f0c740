"""The workloads of a comparison, each a load of `bench serve` with the shape that it is published with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Protocol

from tokenspeed.bench.arrivals import Load
from tokenspeed.bench.conversations import Conversations
from tokenspeed.bench.interference import Interference
from tokenspeed.bench.serve import Run, Sender
from tokenspeed.bench.single_turn import SingleTurn
from tokenspeed.bench.workload import ApiName, DatasetLine, Lengths, Workload
from tokenspeed.contracts.errors import ConfigError

ASKED = {"temperature": 0, "ignore_eos": True}
"""Of every engine, in each request."""
AGENTIC, INTERFERENCE, OVERLOAD, COLD, TRANSLATION = (
    "agentic",
    "interference",
    "overload",
    "cold-start",
    "translation",
)
TIMES_CAPACITY = 2
SENTENCES = (
    "The train to the coast leaves at nine from platform four, so please be there a little earlier.",
    "Could you tell me where the nearest pharmacy is, and whether it is still open at this hour?",
    "We have looked at your proposal with great interest and would like to meet you next week.",
    "The results of the second test were better than those of the first, but not by much.",
    "Please keep the windows closed while the heating is on, and switch off the lights when you leave.",
    "My grandmother used to bake this bread every Sunday, and the whole street smelled of it.",
    "The museum is closed on Mondays, but the garden behind it can be visited all week.",
    "He said that he would call back before noon, but we have not heard anything from him yet.",
)


class Job(Protocol):
    """A load of `bench serve`."""

    @property
    def work(self) -> Workload: ...

    async def run(self, sender: Sender) -> Run: ...


@dataclass(frozen=True)
class Shape:
    """What is asked for; lengths in tokens. concurrency: one comparison for each. per_stream: requests or
    conversations for each that is under way. rate: long prompts per second of `interference`."""

    input_len: int
    output_len: int
    concurrency: tuple[int, ...]
    per_stream: int = 2
    turns: tuple[int, int] = (10, 15)
    turn_len: int = 800
    inject_len: int = 16384
    injections: int = 5
    rate: float = 0.5
    settle_s: float = 3.0

    def __post_init__(self) -> None:
        least = min(self.input_len, self.output_len, self.per_stream, self.turn_len, *self.turns, *self.concurrency)
        if min(least, self.inject_len, self.injections) < 1 or self.turns[0] > self.turns[1]:
            raise ConfigError("lengths, turns, injections, requests and concurrency must be at least 1, turns LOW:HIGH")


SHAPES = {
    "1k1k": Shape(1024, 1024, (1, 4, 16, 64, 256)),
    "8k1k": Shape(8192, 1024, (1, 4, 16, 64, 256)),
    AGENTIC: Shape(50_000, 500, (1, 4, 16), per_stream=1),
    INTERFERENCE: Shape(64, 512, (16,)),
    OVERLOAD: Shape(1024, 256, (64,), per_stream=4),
    COLD: Shape(32, 8, (1,), per_stream=1),
    TRANSLATION: Shape(24, 32, (1, 8), per_stream=8),
}
USED = {
    AGENTIC: ("per_stream", "turns", "turn_len"),
    INTERFERENCE: ("inject_len", "injections", "rate", "settle_s"),
    COLD: (),
}
"""Fields of a shape that a workload uses besides its lengths and concurrency; `per_stream` where it is not named."""


@dataclass(frozen=True)
class Step:
    """One comparison: a workload at one concurrency. rate: requests per second of an overload, once it is known."""

    workload: str
    shape: Shape
    concurrency: int
    api: ApiName = "completions"
    vocab_size: int = 8000
    rate: float | None = None

    @property
    def id(self) -> str:
        """Of its records."""
        return f"compare.{self.workload}.c{self.concurrency}"

    def settings(self) -> dict[str, str | float]:
        """What it asks for, by name."""
        shape = self.shape
        found: dict[str, str | float] = {"workload": self.workload, "api": self.api, "concurrency": self.concurrency}
        if self.workload != TRANSLATION:
            found["input_len"] = shape.input_len
        found["output_len"] = shape.output_len
        known = asdict(shape)
        for name in USED.get(self.workload, ("per_stream",)):
            value = known[name]
            found[name] = f"{value[0]}:{value[1]}" if isinstance(value, tuple) else value
        return found if self.rate is None else found | {"requests_per_s": self.rate}

    def work(self, model: str, extra: dict[str, object], seed: int) -> Workload:
        """Makes its requests; the same seed makes the same ones for every engine."""
        asked, answered = (Lengths(each, each) for each in (self.shape.input_len, self.shape.output_len))
        return Workload(self.api, model, asked, answered, seed, self.vocab_size, ASKED | extra)

    def job(self, work: Workload) -> Job:
        """The load. An overload without its rate is the closed loop that tells it."""
        shape, count = self.shape, self.concurrency * self.shape.per_stream
        load = Load(concurrency=self.concurrency) if self.rate is None else Load(rate=self.rate)
        if self.workload == AGENTIC:
            turns, turn_len = Lengths(*shape.turns), Lengths(shape.turn_len, shape.turn_len)
            return Conversations(work, count, self.concurrency, turns, turn_len, scripted=True)
        if self.workload == INTERFERENCE:
            long = Lengths(shape.inject_len, shape.inject_len)
            arrivals = Load(rate=shape.rate)
            return Interference(work, self.concurrency, arrivals, shape.injections, long, Lengths(1, 1), shape.settle_s)
        if self.workload == TRANSLATION:
            return SingleTurn(work, count, load, _to_translate(count, work.seed))
        return SingleTurn(work, count, load)

    def at_rate(self, rate: float) -> Step:
        """The same, with requests that do not wait for answers."""
        return replace(self, rate=rate)


def _to_translate(count: int, seed: int) -> list[DatasetLine]:
    # A number in front keeps a prefix cache from knowing a sentence that was sent before.
    asked = [f"({seed}-{number}) Translate into French: " for number in range(count)]
    return [DatasetLine(prompt=f"{each}{SENTENCES[i % len(SENTENCES)]}\nFrench:") for i, each in enumerate(asked)]
