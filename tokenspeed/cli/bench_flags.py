"""The flags of `tokenspeed bench serve`, and which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenspeed.contracts.errors import ConfigError

WORKLOADS = ("single-turn", "multi-turn", "shared-prefix", "interference")
"""What --workload takes; --dataset and --trace are kinds of their own."""
SINGLE, MULTI, SHARED, MIXED, DATASET, TRACE = *WORKLOADS, "--dataset", "--trace"
ALL = (SINGLE, MULTI, SHARED, MIXED, DATASET, TRACE)
AT_A_RATE = (SINGLE, DATASET, SHARED, MIXED)


@dataclass(frozen=True)
class Flag:
    """A flag that some kinds of work know. Without one given, `default` holds; None: nothing. least: of a number."""

    name: str
    kinds: tuple[str, ...]
    type: Callable[[str], Any]
    metavar: str
    help: str
    default: Any = None
    least: int | None = None

    @property
    def field(self) -> str:
        """Its name among the parsed options."""
        return self.name.replace("-", "_")


LOAD = (
    Flag("concurrency", (*AT_A_RATE, MULTI), int, "N", "requests or conversations always under way", least=1),
    Flag("rate", AT_A_RATE, float, "R", "requests per second, whatever becomes of those before"),
    Flag("burstiness", AT_A_RATE, float, "B", "gamma shape of the gaps of --rate: 1 is Poisson, below in bursts", 1.0),
    Flag("max-concurrency", (*AT_A_RATE, TRACE), int, "N", "with --rate and --trace: the most under way", least=1),
    Flag(
        "num-requests", (SINGLE, DATASET, MIXED, TRACE), int, "N", "default: 100, 10 injected, a whole trace", least=1
    ),
)
WORK = (
    Flag("input-len", (SINGLE, MULTI, MIXED), str, "N", "tokens of a prompt, or of a first turn; N or LOW:HIGH", "512"),
    Flag("output-len", ALL, str, "N", "max_tokens, N or LOW:HIGH", "128"),
    Flag("dataset", (DATASET,), str, "FILE", "JSON lines with prompt or messages, and max_tokens"),
    Flag("vocab-size", ALL, int, "N", "random prompt ids lie below it", 8000, least=2),
)
MULTI_TURN = (
    Flag("num-conversations", (MULTI,), int, "N", "how many", 20, least=1),
    Flag("turns", (MULTI,), str, "N", "turns of a conversation, N or LOW:HIGH", "5"),
    Flag("turn-len", (MULTI,), str, "N", "tokens that a later turn adds, N or LOW:HIGH", "64"),
    Flag("think-time", (MULTI,), float, "S", "seconds between an answer and the next turn", 0.0),
)
SHARED_PREFIX = (
    Flag("groups", (SHARED,), int, "N", "groups of requests that begin alike", 10, least=1),
    Flag("group-size", (SHARED,), int, "N", "requests in each", 10, least=1),
    Flag("prefix-len", (SHARED,), str, "N", "tokens that a group shares, N or LOW:HIGH", "1024"),
    Flag("suffix-len", (SHARED,), str, "N", "tokens that it does not, N or LOW:HIGH", "64"),
)
INTERFERENCE = (
    Flag("inject-len", (MIXED,), str, "N", "tokens of a long prompt, N or LOW:HIGH", "4096"),
    Flag("inject-output-len", (MIXED,), str, "N", "max_tokens of one, N or LOW:HIGH", "1"),
    Flag("settle", (MIXED,), float, "S", "seconds of steady decoding before and after the long prompts", 5.0),
)
TRACES = (
    Flag("trace", (TRACE,), str, "FILE", "JSON lines with timestamp (ms) and prompt, messages or input_length"),
    Flag("time-scale", (TRACE,), float, "X", "what the times between requests are multiplied by", 1.0),
    Flag("block-size", (TRACE,), int, "N", "tokens of the block that a hash id stands for", 512, least=1),
)
FLAGS = (*LOAD, *WORK, *MULTI_TURN, *SHARED_PREFIX, *INTERFERENCE, *TRACES)


def add_flags(group: argparse._ArgumentGroup, flags: tuple[Flag, ...]) -> None:
    """Add them to a parser; what is not given is None until `settle`."""
    for flag in flags:
        default = "" if flag.default is None else f" (default: {flag.default})"
        group.add_argument(f"--{flag.name}", type=flag.type, metavar=flag.metavar, help=f"{flag.help}{default}")


def settle(options: argparse.Namespace) -> str:
    """The kind of work that is asked for; defaults are filled in.

    Raises ConfigError that names a flag which does not go with it, or a number that is too small.
    """
    given = vars(options)
    sources = [kind for kind in (DATASET, TRACE) if given[kind.removeprefix("--")] is not None]
    kind = options.workload or SINGLE
    if len(sources) > 1:
        raise ConfigError("give one of --dataset and --trace")
    if sources and options.workload:
        raise ConfigError(f"{sources[0]} does not go with --workload {kind}")
    kind = sources[0] if sources else kind
    work = kind if sources else f"--workload {kind}"
    burstiness = options.burstiness
    for flag in FLAGS:
        value = given[flag.field]
        if value is None:
            given[flag.field] = flag.default if kind in flag.kinds else None
        elif kind not in flag.kinds:
            raise ConfigError(f"--{flag.name} does not go with {work}")
        elif flag.least is not None and value < flag.least:
            raise ConfigError(f"--{flag.name} must be at least {flag.least}, got {value}")
    if burstiness is not None and options.rate is None:
        raise ConfigError("--burstiness needs --rate")
    if options.token_ids and kind != MULTI:
        raise ConfigError(f"--token-ids does not go with {work}")
    if options.goodput and kind == MIXED:
        raise ConfigError(f"--goodput does not go with {work}")
    if kind == MULTI and options.concurrency is None:
        raise ConfigError(f"{work} needs --concurrency")
    if kind == MIXED and (options.concurrency is None or options.rate is None):
        raise ConfigError(f"{work} needs --concurrency and --rate")
    return kind
