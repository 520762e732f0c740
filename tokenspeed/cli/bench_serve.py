"""`tokenspeed bench serve`: a load on any OpenAI-compatible server, and the report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenspeed.cli import bench_flags
from tokenspeed.cli.bench_flags import MIXED, MULTI, SHARED, TRACE
from tokenspeed.contracts.errors import ConfigError, TokenSpeedError

if TYPE_CHECKING:
    from tokenspeed.bench.arrivals import Load
    from tokenspeed.bench.conversations import Conversations
    from tokenspeed.bench.interference import Interference
    from tokenspeed.bench.serve import Run, Sender
    from tokenspeed.bench.serve_report import Report
    from tokenspeed.bench.shared_prefix import SharedPrefix
    from tokenspeed.bench.single_turn import SingleTurn
    from tokenspeed.bench.trace import Trace
    from tokenspeed.bench.workload import Lengths, Workload

    Job = SingleTurn | Conversations | SharedPrefix | Interference | Trace

WARM_UP_LEN = 64
"""Tokens of a warm-up's prompt where a file has the prompts."""


def add_parser(kinds: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "serve",
        help="put a load on an OpenAI-compatible server",
        description="Send requests to any OpenAI-compatible server and report latencies, rates and errors. Tokens are "
        "those of the server's usage.",
    )
    parser.set_defaults(run=run)
    target = parser.add_argument_group("target")
    target.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    target.add_argument("--model", metavar="NAME", help="default: the first one that the server lists")
    target.add_argument("--api", choices=("completions", "chat"), default="completions", help="default: %(default)s")
    target.add_argument("--api-key", metavar="KEY", help="default: the environment's OPENAI_API_KEY")
    load = parser.add_argument_group("load")
    bench_flags.add_flags(load, bench_flags.LOAD)
    load.add_argument("--warmup", type=int, default=1, metavar="N", help="requests before, not counted (default: 1)")
    load.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one request (default: 600)")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals (default: 0)")
    _add_work(parser)
    _add_output(parser.add_argument_group("output"))


def _add_work(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("work")
    work.add_argument("--workload", choices=bench_flags.WORKLOADS, help="default: single-turn")
    bench_flags.add_flags(work, bench_flags.WORK)
    work.add_argument("--ignore-eos", action="store_true", help="ask for all of --output-len (vLLM's extension)")
    work.add_argument("--extra-body", default="{}", metavar="JSON", help="fields to add to each request")
    multi = parser.add_argument_group("--workload multi-turn")
    bench_flags.add_flags(multi, bench_flags.MULTI_TURN)
    multi.add_argument(
        "--token-ids", action="store_true", help="send answers back as ids (vLLM's extension return_token_ids)"
    )
    bench_flags.add_flags(parser.add_argument_group("--workload shared-prefix"), bench_flags.SHARED_PREFIX)
    bench_flags.add_flags(parser.add_argument_group("--workload interference"), bench_flags.INTERFERENCE)
    bench_flags.add_flags(parser.add_argument_group("replay"), bench_flags.TRACES)


def _add_output(output: argparse._ArgumentGroup) -> None:
    output.add_argument(
        "--goodput", metavar="LIMITS", help="count requests within limits in ms: ttft:500,tpot:50,e2e:2000"
    )
    output.add_argument("--json", metavar="FILE", help="write the report as JSON, - is stdout")
    output.add_argument("--record", metavar="FILE", help="add the figures to a file of benchmark records")
    output.add_argument("--record-id", metavar="ID", default="serve.bench", help="ids begin so (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Measure and report. Raises TokenSpeedError where a request failed, after the report."""
    import uvloop

    from tokenspeed.bench.record import surroundings, write
    from tokenspeed.bench.serve_report import Limits, records, report

    kind = bench_flags.settle(options)
    if options.warmup < 0 or not options.timeout > 0:
        raise ConfigError("--warmup must be at least 0, --timeout above 0")
    limits = Limits.parse(options.goodput) if options.goodput else None
    measured = uvloop.run(_measure(options, kind))
    found = report(measured, limits)
    _show(found, options.json)
    if options.record:
        made = records(found, measured, options.record_id, surroundings(_command(sys.argv[1:])))
        write(options.record, made)
    if found.errors:
        raise TokenSpeedError(f"{found.requests - found.completed} of {found.requests} requests failed")


def _command(given: Sequence[str]) -> str:
    """What a record says of the command: without the key, which is nobody's who reads it."""
    kept = [each for before, each in zip(["", *given], given, strict=False) if "--api-key" not in (before, each)]
    return shlex.join(["tokenspeed", *(each for each in kept if not each.startswith("--api-key="))])


def _show(found: Report, path: str | None) -> None:
    import msgspec

    from tokenspeed.bench.serve_report import text

    encoded = msgspec.json.format(msgspec.json.encode(found), indent=2)
    if path == "-":
        print(encoded.decode())
        return
    print(text(found))
    if path:
        with open(path, "wb") as file:
            file.write(encoded)


async def _measure(options: argparse.Namespace, kind: str) -> Run:
    from dataclasses import replace

    from tokenspeed.bench.serve import Sender, first_model
    from tokenspeed.bench.sse_client import Client, Endpoint

    client = Client(Endpoint.parse(options.base_url, options.api_key or os.environ.get("OPENAI_API_KEY")))
    # What is wrong with flags or files shows before the server is asked.
    job = _job(options, kind)
    try:
        job = replace(job, work=replace(job.work, model=options.model or await first_model(client)))
        sender = Sender(client, job.work.path, options.timeout)
        await _warm_up(sender, job.work, options.warmup)
        return await job.run(sender)
    finally:
        client.close()


async def _warm_up(sender: Sender, work: Workload, count: int) -> None:
    from dataclasses import replace

    from tokenspeed.bench.arrivals import Load
    from tokenspeed.bench.serve import send_all

    # Other prompts than those that count: a prefix cache must not know them already.
    bodies = replace(work, seed=work.seed + 1_000_003).bodies(count)
    for request in (await send_all(sender, bodies, Load(concurrency=1))).requests:
        if request.error is not None:
            raise TokenSpeedError(f"the warm-up failed: {request.error}")


def _job(options: argparse.Namespace, kind: str) -> Job:
    make = {MULTI: _multi_turn, SHARED: _shared_prefix, MIXED: _interference, TRACE: _trace}.get(kind, _single_turn)
    return make(options, _workload(options))


def _single_turn(options: argparse.Namespace, work: Workload) -> Job:
    from tokenspeed.bench.single_turn import SingleTurn
    from tokenspeed.bench.workload import read_dataset

    load = _load(options)
    lines = read_dataset(options.dataset, options.api) if options.dataset else []
    return SingleTurn(work, options.num_requests or 100, load, lines)


def _multi_turn(options: argparse.Namespace, work: Workload) -> Job:
    from tokenspeed.bench.conversations import Conversations

    return Conversations(
        work,
        options.num_conversations,
        options.concurrency,
        _lengths(options, "turns"),
        _lengths(options, "turn-len"),
        options.think_time,
        options.token_ids,
    )


def _shared_prefix(options: argparse.Namespace, work: Workload) -> Job:
    from dataclasses import replace

    from tokenspeed.bench.shared_prefix import SharedPrefix
    from tokenspeed.bench.workload import Lengths

    prefix, suffix = _lengths(options, "prefix-len"), _lengths(options, "suffix-len")
    # A warm-up's prompt is as long as those that count.
    work = replace(work, input_len=Lengths(prefix.low + suffix.low, prefix.high + suffix.high))
    return SharedPrefix(work, _load(options), options.groups, options.group_size, prefix, suffix)


def _interference(options: argparse.Namespace, work: Workload) -> Job:
    from tokenspeed.bench.arrivals import Load
    from tokenspeed.bench.interference import Interference

    return Interference(
        work,
        options.concurrency,
        Load(rate=options.rate, burstiness=options.burstiness, max_concurrency=options.max_concurrency),
        options.num_requests or 10,
        _lengths(options, "inject-len"),
        _lengths(options, "inject-output-len"),
        options.settle,
    )


def _trace(options: argparse.Namespace, work: Workload) -> Job:
    from tokenspeed.bench.trace import Trace, read_trace

    lines = read_trace(options.trace, options.api, options.block_size)[: options.num_requests]
    return Trace(work, lines, options.block_size, options.time_scale, options.max_concurrency)


def _load(options: argparse.Namespace) -> Load:
    from tokenspeed.bench.arrivals import Load

    return Load(options.concurrency, options.rate, options.burstiness, options.max_concurrency)


def _lengths(options: argparse.Namespace, flag: str) -> Lengths:
    from tokenspeed.bench.workload import Lengths

    return Lengths.parse(vars(options)[flag.replace("-", "_")], f"--{flag}")


def _workload(options: argparse.Namespace) -> Workload:
    import msgspec

    from tokenspeed.bench.workload import Lengths, Workload

    try:
        extra = msgspec.json.decode(options.extra_body, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--extra-body must be a JSON object: {error}") from None
    if options.ignore_eos:
        extra["ignore_eos"] = True
    input_len = _lengths(options, "input-len") if options.input_len else Lengths(WARM_UP_LEN, WARM_UP_LEN)
    output_len = _lengths(options, "output-len")
    return Workload(options.api, "", input_len, output_len, options.seed, options.vocab_size, extra)
