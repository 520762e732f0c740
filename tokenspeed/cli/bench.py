"""`tokenspeed bench`: measuring the host's share of a step, and a server under load."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from tokenspeed.contracts.errors import ConfigError, TokenSpeedError

if TYPE_CHECKING:
    from tokenspeed.bench.serve import Load, Run
    from tokenspeed.bench.sse_client import Client
    from tokenspeed.bench.workload import DatasetLine, Workload


def add_parser(commands: Any) -> None:
    """Register the subcommand and its own subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure the host overhead, or a server under load",
        description="Measure. `bench COMMAND --help` says more.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="COMMAND", help="host or serve")
    host: argparse.ArgumentParser = kinds.add_parser(
        "host",
        help="measure the host's share of a step",
        description="The host's own work per step, with an executor that computes nothing; about a minute.",
    )
    host.add_argument(
        "--output", metavar="FILE", help="file of records to add to (default: benchmarks/results/host.json)"
    )
    host.set_defaults(run=run_host)
    _add_serve(kinds)


def _add_serve(kinds: Any) -> None:
    parser: argparse.ArgumentParser = kinds.add_parser(
        "serve",
        help="put a load on an OpenAI-compatible server",
        description="Send requests to any OpenAI-compatible server and report latencies, rates and errors. Tokens are "
        "those of the server's usage.",
    )
    parser.set_defaults(run=run_serve)
    target = parser.add_argument_group("target")
    target.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    target.add_argument("--model", metavar="NAME", help="default: the first one that the server lists")
    target.add_argument("--api", choices=("completions", "chat"), default="completions", help="default: %(default)s")
    target.add_argument("--api-key", metavar="KEY", help="default: the environment's OPENAI_API_KEY")
    load = parser.add_argument_group("load")
    load.add_argument("--concurrency", type=int, metavar="N", help="requests always under way")
    load.add_argument("--rate", type=float, metavar="R", help="requests per second, at Poisson times")
    load.add_argument("--num-requests", type=int, default=100, metavar="N", help="default: %(default)s")
    load.add_argument("--warmup", type=int, default=1, metavar="N", help="requests before, not counted (default: 1)")
    load.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one request (default: 600)")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals (default: 0)")
    _add_work(parser.add_argument_group("work"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--goodput", metavar="LIMITS", help="count requests within limits in ms: ttft:500,tpot:50,e2e:2000"
    )
    output.add_argument("--json", metavar="FILE", help="write the report as JSON, - is stdout")
    output.add_argument("--record", metavar="FILE", help="add the figures to a file of benchmark records")
    output.add_argument("--record-id", metavar="ID", default="serve.bench", help="ids begin so (default: %(default)s)")


def _add_work(work: Any) -> None:
    work.add_argument("--input-len", default="512", metavar="N", help="prompt tokens, N or LOW:HIGH (default: 512)")
    work.add_argument("--output-len", default="128", metavar="N", help="max_tokens, N or LOW:HIGH (default: 128)")
    work.add_argument("--dataset", metavar="FILE", help="JSON lines with prompt or messages, and max_tokens")
    work.add_argument(
        "--vocab-size", type=int, default=8000, metavar="N", help="random prompt ids lie below it (default: 8000)"
    )
    work.add_argument("--ignore-eos", action="store_true", help="ask for all of --output-len (vLLM's extension)")
    work.add_argument("--extra-body", default="{}", metavar="JSON", help="fields to add to each request")


def run_host(options: argparse.Namespace) -> None:
    """Measure and record."""
    from tokenspeed.bench import host

    host.main(["--output", options.output] if options.output else [])


def run_serve(options: argparse.Namespace) -> None:
    """Measure and report. Raises TokenSpeedError where a request failed, after the report."""
    import msgspec
    import uvloop

    from tokenspeed.bench.record import surroundings, write
    from tokenspeed.bench.serve import Load
    from tokenspeed.bench.serve_report import Limits, records, report, text

    load = Load(options.concurrency, options.rate)
    limits = Limits.parse(options.goodput) if options.goodput else None
    if options.num_requests < 1 or options.warmup < 0 or options.vocab_size < 2:
        raise ConfigError("--num-requests must be at least 1, --warmup at least 0, --vocab-size at least 2")
    run = uvloop.run(_measure(options, load))
    found = report(run, limits)
    if options.json == "-":
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        print(text(found))
        if options.json:
            with open(options.json, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(found), indent=2))
    if options.record:
        made = records(found, run, options.record_id, surroundings(f"tokenspeed {shlex.join(sys.argv[1:])}"))
        write(options.record, made)
    if found.errors:
        raise TokenSpeedError(f"{found.requests - found.completed} of {found.requests} requests failed")


async def _measure(options: argparse.Namespace, load: Load) -> Run:
    from tokenspeed.bench.serve import drive, first_model
    from tokenspeed.bench.sse_client import Client, Endpoint
    from tokenspeed.bench.workload import read_dataset

    client = Client(Endpoint.parse(options.base_url, options.api_key or os.environ.get("OPENAI_API_KEY")))
    dataset = read_dataset(options.dataset, options.api) if options.dataset else None
    workload = _workload(options, options.model or await first_model(client))
    try:
        await _warm_up(client, workload, dataset, options)
        bodies = workload.bodies(options.num_requests, dataset)
        return await drive(client, workload.path, bodies, load, timeout=options.timeout, seed=options.seed)
    finally:
        client.close()


async def _warm_up(
    client: Client, workload: Workload, dataset: list[DatasetLine] | None, options: argparse.Namespace
) -> None:
    from dataclasses import replace

    from tokenspeed.bench.serve import Load, drive

    # Other prompts than those that count: a prefix cache must not know them already.
    bodies = replace(workload, seed=workload.seed + 1_000_003).bodies(options.warmup, dataset and dataset[::-1])
    run = await drive(client, workload.path, bodies, Load(concurrency=1), timeout=options.timeout)
    for request in run.requests:
        if request.error is not None:
            raise TokenSpeedError(f"the warm-up failed: {request.error}")


def _workload(options: argparse.Namespace, model: str) -> Workload:
    import msgspec

    from tokenspeed.bench.workload import Lengths, Workload

    try:
        extra = msgspec.json.decode(options.extra_body, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--extra-body must be a JSON object: {error}") from None
    if options.ignore_eos:
        extra["ignore_eos"] = True
    return Workload(
        options.api,
        model,
        Lengths.parse(options.input_len, "--input-len"),
        Lengths.parse(options.output_len, "--output-len"),
        options.seed,
        options.vocab_size,
        extra,
    )
