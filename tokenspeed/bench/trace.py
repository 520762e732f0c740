"""Replaying a trace: requests at the times of a file, with prompts of the file or made to share what they shared.

The format is that of Mooncake's published traces (https://github.com/kvcache-ai/Mooncake): a JSON object a line with
timestamp in ms, input_length, output_length and hash_ids, the ids of the blocks of 512 tokens that the prompt begins
with, the last one perhaps incomplete.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any

from tokenspeed.bench.arrivals import Load
from tokenspeed.bench.serve import Run, Sender, send_all
from tokenspeed.bench.workload import ApiName, DatasetLine, Workload, check_line, read_lines
from tokenspeed.contracts.errors import ConfigError

_KEPT_BLOCKS = 1024


class TraceLine(DatasetLine, kw_only=True, forbid_unknown_fields=True):
    """A line of a trace: when (ms), and either a prompt or messages, or a length with or without the ids of blocks."""

    timestamp: float
    input_length: int | None = None
    output_length: int | None = None
    hash_ids: list[int | str] | None = None


@dataclass(frozen=True)
class Trace:
    """lines: in order of time. time_scale: what the times between them are multiplied by."""

    work: Workload
    lines: list[TraceLine]
    block_size: int = 512
    time_scale: float = 1.0
    max_concurrency: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.time_scale < float("inf"):
            raise ConfigError(f"--time-scale must be above 0, got {self.time_scale}")

    def __str__(self) -> str:
        seen = self.seen_share()
        shared = "" if seen is None else f", {seen:.1%} of their input in blocks seen before"
        return f"a trace of {len(self.lines)} requests, time scale {self.time_scale:g}{shared}"

    async def run(self, sender: Sender) -> Run:
        """Replay it. All prompts are made before the first is sent."""
        load = Load(times=self.times(), max_concurrency=self.max_concurrency)
        run = await send_all(sender, self.bodies(), load)
        return replace(run, load=f"{self}, {load}")

    def times(self) -> tuple[float, ...]:
        """When each is due, in seconds from the first."""
        start, scale = self.lines[0].timestamp, self.time_scale / 1e3
        return tuple((line.timestamp - start) * scale for line in self.lines)

    def bodies(self) -> Iterator[bytes]:
        """One per line. Blocks of one id hold the same tokens, whichever line they are in."""
        block = lru_cache(_KEPT_BLOCKS)(self._block)
        for number, line in enumerate(self.lines):
            generator = random.Random(f"{self.work.seed}/line/{number}")
            if line.input_length is None:
                asked = self.work.asked_by(line)
            elif line.hash_ids is None:
                asked = self.work.asked(self.work.pieces(generator, line.input_length))
            else:
                pieces = chain.from_iterable(map(block, line.hash_ids))
                asked = self.work.asked(list(pieces)[: line.input_length])
            tokens = line.max_tokens or line.output_length or self.work.output_len.draw(generator)
            yield self.work.body(asked, tokens)

    def seen_share(self) -> float | None:
        """The part of the input that lies in blocks of earlier requests: what an endless cache could hold at most.

        None where no line has blocks.
        """
        seen: set[int | str] = set()
        total = shared = 0
        for line in self.lines:
            if line.hash_ids is None or line.input_length is None:
                continue
            known = next((i for i, key in enumerate(line.hash_ids) if key not in seen), len(line.hash_ids))
            shared += min(known * self.block_size, line.input_length)
            total += line.input_length
            seen.update(line.hash_ids)
        return shared / total if total else None

    def _block(self, key: int | str) -> list[Any]:
        return self.work.pieces(random.Random(f"{self.work.seed}/block/{key}"), self.block_size)


def read_trace(path: str, api: ApiName, block_size: int) -> list[TraceLine]:
    """Its lines in order of time. Raises ConfigError naming the line that cannot be used."""
    lines = []
    for place, line in read_lines(path, "--trace", TraceLine):
        _check(line, api, block_size, place)
        lines.append(line)
    return sorted(lines, key=lambda line: line.timestamp)


def _check(line: TraceLine, api: ApiName, block_size: int, place: str) -> None:
    if line.max_tokens is not None and line.output_length is not None:
        raise ConfigError(f"{place}: has both max_tokens and output_length")
    for name, number in (("input_length", line.input_length), ("output_length", line.output_length)):
        if number is not None and number < 1:
            raise ConfigError(f"{place}: {name} must be at least 1, got {number}")
    if line.input_length is None:
        if line.hash_ids is not None:
            raise ConfigError(f"{place}: hash_ids need input_length")
        check_line(line, api, place)
    elif line.prompt is not None or line.messages is not None:
        raise ConfigError(f"{place}: needs one of prompt, messages and input_length")
    elif line.hash_ids is not None and -(-line.input_length // block_size) != len(line.hash_ids):
        blocks = f"{len(line.hash_ids)} hash_ids of {block_size} tokens"
        raise ConfigError(f"{place}: input_length {line.input_length} is not that of {blocks} (see --block-size)")
