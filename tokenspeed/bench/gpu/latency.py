"""One model's decode and first-token times, with floors, the graphs' own time beside them, and kernels that add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tokenspeed.bench.gpu.bare import bare_ms
from tokenspeed.bench.gpu.ceilings import ceilings_of
from tokenspeed.bench.gpu.decode import TOKENS, Point, measure
from tokenspeed.bench.gpu.floors import decode_floor_ms, prefill_floor_ms
from tokenspeed.bench.gpu.profile import per_op
from tokenspeed.bench.gpu.publish import Publisher
from tokenspeed.bench.gpu.setup import Setup
from tokenspeed.bench.gpu.targets import host_target
from tokenspeed.bench.gpu.waterfall import STEPS
from tokenspeed.bench.stats import median_interval
from tokenspeed.engine.llm import LLM

USUAL_CONTEXT = 1024
"""An id tells other contexts."""


@dataclass(frozen=True)
class Measurement:
    """Points of an opened model. Figures that need graphs are left out on a CPU."""

    setup: Setup
    llm: LLM
    publisher: Publisher

    @staticmethod
    def opened(setup: Setup, sequences: int, length: int, publisher: Publisher) -> Measurement:
        """With an engine for so many sequences of at most `length` tokens."""
        ceilings_of(setup.device)  # needs memory that the engine takes
        return Measurement(setup, setup.open(sequences, length), publisher)

    def decode(self, batch: int, context: int, tokens: int = TOKENS, *, plain: Point | None = None) -> Point:
        """Milliseconds per token, published. plain: the greedy point that a sampled one is compared with."""
        draws = plain is not None
        self.setup.say_experts(self.llm, batch, context)
        point = measure(self.llm, batch, context, tokens, draws=draws)
        floor = decode_floor_ms(self.llm, batch, point.mean_context, ceilings_of(self.setup.device))
        beside: dict[str, Any] = {}
        if plain is not None:
            ratio = median_interval([point.decode_ms / plain.decode_ms])
            beside = {"peer": "greedy", "peer_value": plain.decode_ms, "ratio": ratio}
        id = self.setup.id(*decode_parts(batch, context, draws))
        self.publisher.add(id, point.decode_ms, "ms", floor=floor, samples=point.samples, **beside)
        return point

    def first(self, point: Point) -> None:
        """Time to first token of one prompt, from a point of batch 1."""
        floor = prefill_floor_ms(self.llm, point.context, ceilings_of(self.setup.device))
        samples = {"short_ms": point.short_ms}
        self.publisher.add(self.setup.id(f"ttft{point.context}"), point.first_ms, "ms", floor=floor, samples=samples)

    def graph(self, point: Point, draws: bool = False) -> None:
        """The graphs' own time, and what a step takes beyond it."""
        if self.setup.device == "cpu":
            return
        parts = decode_parts(point.batch, point.context, draws)
        found = bare_ms(self.llm, point.batch, point.context, point.tokens - 1, draws=draws)
        graph = median(found)
        floor = decode_floor_ms(self.llm, point.batch, point.mean_context, ceilings_of(self.setup.device))
        self.publisher.add(self.setup.id(*parts, "graph"), graph, "ms", floor=floor, samples={"graph_ms": found})
        beyond = (point.decode_ms - graph) * 1e3
        self.publisher.add(self.setup.id(*parts, "host"), beyond, "us", target=host_target(graph))

    def table(self, point: Point, draws: bool = False) -> None:
        """The step's kernels; the span is recorded, a sample per line."""
        if self.setup.device == "cpu":
            return
        if point.tokens < STEPS + 2:
            print(f"no table of kernels: it averages over {STEPS} steps, {point.tokens} tokens are drawn")
            return
        found = per_op(self.llm, point.batch, point.context, point.tokens, draws)
        print(found.text(), flush=True)
        id = self.setup.id(*decode_parts(point.batch, point.context, draws), "per_op")
        self.publisher.add(id, found.span / found.steps / 1e3, "ms", samples=found.samples())


def decode_parts(batch: int, context: int, draws: bool) -> list[str]:
    """Of an id: decode, b8, ctx8192, sampled."""
    parts = ["decode", f"b{batch}"]
    parts += [f"ctx{context}"] if context != USUAL_CONTEXT else []
    return parts + (["sampled"] if draws else [])


def length_for(context: int, tokens: int) -> int:
    """Tokens of a sequence that an engine must take for all of this."""
    return context + 2 * tokens


def run_latency(
    setup: Setup, batches: Sequence[int], context: int, tokens: int, draws: bool, publisher: Publisher
) -> None:
    """Everything of `Measurement` at each batch."""
    measurement = Measurement.opened(setup, max(batches), length_for(context, tokens), publisher)
    for batch in batches:
        point = measurement.decode(batch, context, tokens)
        if batch == 1:
            measurement.first(point)
        if draws:
            point = measurement.decode(batch, context, tokens, plain=point)
        measurement.graph(point, draws)
        measurement.table(point, draws)
    measurement.llm.close()
