"""`tokenspeed bench compare`: engines against each other, alternately, on the same work."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenspeed.contracts.errors import ConfigError, TokenSpeedError

if TYPE_CHECKING:
    from tokenspeed.bench.compare.engines import Engine
    from tokenspeed.bench.compare.workloads import Step

WORKLOADS = ("1k1k", "8k1k", "agentic", "interference", "overload", "cold-start", "translation")


def add_parser(kinds: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "compare",
        help="engines against each other, alternately, on the same work",
        description="Start two or more engines, or use endpoints that run, give them the same requests by turns, check "
        "that all did the same work, and print ratios to the last one with intervals. docs/compare.md says more.",
    )
    parser.set_defaults(run=run)
    engines = parser.add_argument_group("engines")
    engines.add_argument(
        "--engine",
        action="append",
        required=True,
        metavar="NAME=SPEC",
        help="twice or more: a URL, 'PROGRAM MODEL FLAGS' with tokenspeed, vllm, sglang, trtllm or llama.cpp as the "
        "program, or a command with {port}",
    )
    engines.add_argument("--extra", action="append", default=[], metavar="NAME=JSON", help="fields of its requests")
    engines.add_argument("--api-key", metavar="KEY", help="default: the environment's OPENAI_API_KEY")
    engines.add_argument("--restart", action="store_true", help="start each engine for each run: one at a time")
    engines.add_argument("--ready-timeout", type=float, default=900.0, metavar="S", help="for a start (default: 900)")
    _add_work(parser.add_argument_group("work"))
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="FILE", help="add the figures to a file of benchmark records")
    output.add_argument("--page", type=Path, metavar="FILE", help="write the report as Markdown, too")


def _add_work(work: argparse._ArgumentGroup) -> None:
    work.add_argument("--workload", choices=WORKLOADS, required=True)
    work.add_argument("--api", choices=("completions", "chat"), default="completions", help="default: %(default)s")
    work.add_argument("--rounds", type=int, default=7, metavar="N", help="of every engine (default: 7)")
    work.add_argument("--warmup", type=int, default=2, metavar="N", help="requests before, not counted (default: 2)")
    work.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one request (default: 600)")
    work.add_argument("--vocab-size", type=int, default=8000, metavar="N", help="random ids lie below (default: 8000)")
    work.add_argument("--concurrency", type=int, nargs="+", metavar="N", help="one comparison for each")
    for name, text in (
        ("input-len", "tokens of a prompt, or of a first turn"),
        ("output-len", "tokens of an answer"),
        ("per-stream", "requests, or conversations, for each under way"),
        ("turn-len", "tokens that a later turn adds"),
        ("inject-len", "tokens of a long prompt of interference"),
        ("injections", "how many long prompts"),
    ):
        work.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: the workload's)")
    work.add_argument("--turns", metavar="LOW:HIGH", help="turns of a conversation (default: 10:15)")
    work.add_argument("--rate", type=float, metavar="R", help="long prompts per second (default: 0.5)")
    work.add_argument("--settle", type=float, metavar="S", help="steady seconds around them (default: 3)")


def run(options: argparse.Namespace) -> None:
    """Compare, print and record. Raises TokenSpeedError where engines did other work than the same, after the page."""
    from contextlib import ExitStack

    from tokenspeed.bench.compare.clocks import with_gpus
    from tokenspeed.bench.compare.page import page
    from tokenspeed.bench.compare.rounds import Engines, Plan, compare, records
    from tokenspeed.bench.record import surroundings, write

    steps, engines = _steps(options), _engines(options)
    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    plan = Plan(options.rounds, options.warmup, options.restart, options.timeout, options.ready_timeout, key)
    around = surroundings(_command(sys.argv[1:]))
    around["machine"] = with_gpus(around["machine"])
    found, made = [], []
    # A cold start begins and ends its engines itself.
    plan = replace(plan, restart=plan.restart or options.workload == "cold-start")
    with ExitStack() as stack:
        sides = Engines(engines, plan, stack)
        for step in steps:
            found.append(compare(sides, step))
            if not found[-1].differences:
                made += records(found[-1], engines, around)
            text = page(found, made, engines, around)
            if options.page:
                options.page.write_text(text)
            if options.out and made:
                write(options.out, made)
    print(text)
    bad = [each.step.id for each in found if each.differences]
    if bad:
        raise TokenSpeedError(f"not the same work in {', '.join(bad)}: nothing is recorded of it")


def _engines(options: argparse.Namespace) -> list[Engine]:
    import msgspec

    from tokenspeed.bench.compare.engines import Engine

    extras: dict[str, dict[str, Any]] = {}
    for text in options.extra:
        name, _, given = text.partition("=")
        try:
            extras[name] = msgspec.json.decode(given, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise ConfigError(f"--extra {name}: must be NAME={{JSON}}: {error}") from None
    engines = [Engine.parse(text, extras.pop(text.partition("=")[0], {})) for text in options.engine]
    names = [engine.name for engine in engines]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"give --engine twice or more, with different names, got {', '.join(names)}")
    if extras:
        raise ConfigError(f"--extra {next(iter(extras))}: no engine has that name")
    return engines


def _steps(options: argparse.Namespace) -> list[Step]:
    from tokenspeed.bench.compare.workloads import SHAPES, Step
    from tokenspeed.bench.workload import Lengths

    asked = vars(options)
    numbers = ("input_len", "output_len", "per_stream", "turn_len", "inject_len", "injections", "rate")
    changes: dict[str, Any] = {name: asked[name] for name in numbers if asked[name] is not None}
    if options.settle is not None:
        changes["settle_s"] = options.settle
    if options.concurrency is not None:
        changes["concurrency"] = tuple(options.concurrency)
    if options.turns is not None:
        turns = Lengths.parse(options.turns, "--turns")
        changes["turns"] = (turns.low, turns.high)
    shape = replace(SHAPES[options.workload], **changes)
    if options.vocab_size < 2:
        raise ConfigError(f"--vocab-size must be at least 2, got {options.vocab_size}")
    return [Step(options.workload, shape, each, options.api, options.vocab_size) for each in shape.concurrency]


def _command(given: list[str]) -> str:
    """What a record says of the command: without the key, where results went, and folders of this machine."""
    from tokenspeed.bench.compare.engines import plain

    hidden = ("--api-key", "--page", "--out")
    kept = [each for before, each in zip(["", *given], given, strict=False) if not {before, each} & set(hidden)]
    words = [each for each in kept if not each.startswith(tuple(f"{flag}=" for flag in hidden))]
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        name, _, spec = word.partition("=")
        shown.append(f"{name}={shlex.join(map(plain, shlex.split(spec)))}" if before == "--engine" else word)
    return shlex.join(["tokenspeed", *shown])
