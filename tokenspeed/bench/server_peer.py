"""Our server against llama.cpp's on one file, in alternating runs: `python -m tokenspeed.bench.server_peer`.

Both get the same threads, slots, context and requests, greedy, with no prompt seen before and no prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from tokenspeed.bench import llama_cpp
from tokenspeed.bench.record import Record, command_of, surroundings, write
from tokenspeed.bench.running_server import RunningServer, free_port, our_command, serving
from tokenspeed.bench.serve import Load, drive, first_model
from tokenspeed.bench.serve_report import Report, report
from tokenspeed.bench.sse_client import Client, Endpoint
from tokenspeed.bench.stats import median_interval, paired
from tokenspeed.bench.table import line
from tokenspeed.bench.workload import Lengths, Workload
from tokenspeed.config.demo import demo_model_path
from tokenspeed.contracts.errors import ConfigError, TokenSpeedError

RESULTS = Path("benchmarks/results/server_peer.json")
ASKED: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
"""Of both, in each request."""
PEER_ASKED: dict[str, Any] = {"cache_prompt": False}


@dataclass(frozen=True)
class Shape:
    """What both servers are set to, and the requests of every run."""

    threads: int = 2
    slots: int = 16
    context: int = 512
    """Of a slot."""
    input_len: int = 128
    output_len: int = 64

    def our_flags(self) -> list[str]:
        """Of `tokenspeed serve`."""
        sizes = [
            "--threads",
            str(self.threads),
            "--max-num-seqs",
            str(self.slots),
            "--max-model-len",
            str(self.context),
        ]
        return [*sizes, "--no-enable-prefix-caching", "--log-format", "json"]

    def peer_flags(self) -> list[str]:
        """Of llama-server, whose context is that of all slots together."""
        threads = ["--threads", str(self.threads), "--threads-batch", str(self.threads)]
        sizes = ["--parallel", str(self.slots), "--ctx-size", str(self.slots * self.context)]
        return [*threads, *sizes, "--cache-ram", "0", "--no-cache-prompt", "--no-ui", "--host", "127.0.0.1"]

    def num_requests(self, concurrency: int) -> int:
        """Of one run."""
        return max(6, 3 * concurrency)


@dataclass
class Side:
    """One of the two servers, and the reports of its runs."""

    server: RunningServer
    shape: Shape
    extra: dict[str, Any]
    reports: list[Report] = field(default_factory=list)

    def run(self, concurrency: int) -> float:
        """Tokens per second, of prompts and outputs. The n-th run of either side has the same requests.

        Raises ConfigError where a request fails, or did other work than it was asked for.
        """
        found = asyncio.run(self._drive(concurrency))
        _check(found, self.shape)
        self.reports.append(found)
        return found.total_tok_s

    async def _drive(self, concurrency: int) -> Report:
        endpoint, shape = Endpoint.parse(self.server.url), self.shape
        client = Client(replace(endpoint, headers=("Connection: close",)))  # llama-server ends them unannounced
        lengths = Lengths(shape.input_len, shape.input_len), Lengths(shape.output_len, shape.output_len)
        try:
            model = await first_model(client)
            work = Workload("completions", model, *lengths, seed=len(self.reports), extra=ASKED | self.extra)
            bodies = work.bodies(shape.num_requests(concurrency))
            return report(await drive(client, work.path, bodies, Load(concurrency=concurrency)))
        finally:
            client.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, record; 2 where that cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FILE", help="a .gguf file (default: the demo model)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="default: 1 4 16")
    parser.add_argument("--pairs", type=int, default=7, metavar="N", help="of each concurrency (default: 7)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of either server (default: 2)")
    parser.add_argument("--input-len", type=int, default=128, metavar="N", help="prompt tokens (default: 128)")
    parser.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens drawn (default: 64)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="of records (default: %(default)s)")
    options = parser.parse_args(arguments)
    command = command_of("python -m tokenspeed.bench.server_peer", sys.argv[1:] if arguments is None else arguments)
    shape = Shape(threads=options.threads, input_len=options.input_len, output_len=options.output_len)
    try:
        for records in run(options.model or demo_model_path(), shape, options.concurrency, options.pairs, command):
            for record in records:
                print(line(record), flush=True)
            write(options.out, records)
    except TokenSpeedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def run(model: Path, shape: Shape, concurrencies: Sequence[int], pairs: int, command: str) -> Iterator[list[Record]]:
    """Start both servers and compare them, one concurrency after the other. Raises ConfigError."""
    if max(concurrencies) > shape.slots:
        raise ConfigError(f"--concurrency {max(concurrencies)}: both servers have {shape.slots} slots")
    program = llama_cpp.build(targets=[llama_cpp.SERVER]) / llama_cpp.SERVER
    our_port, peer_port = free_port(), free_port()
    ours = our_command(our_port, model, *shape.our_flags())
    peer = [str(program), "--model", str(model), "--port", str(peer_port), *shape.peer_flags()]
    for each in (ours, peer):
        print(shlex.join(Path(part).name if part.startswith("/") else part for part in each), flush=True)
    with ExitStack() as stack:
        sides = [
            Side(stack.enter_context(serving(each, port)), shape, extra)
            for each, port, extra in ((ours, our_port, {}), (peer, peer_port, PEER_ASKED))
        ]
        for concurrency in concurrencies:
            yield compare(sides[0], sides[1], concurrency, pairs, command)


def compare(ours: Side, peer: Side, concurrency: int, pairs: int, command: str) -> list[Record]:
    """Records of total rate and of the 99th percentile of TTFT, both with the ratio of ours to the peer's."""
    result = paired(lambda: ours.run(concurrency), lambda: peer.run(concurrency), pairs)
    (late, peer_late), (out, peer_out) = (
        [[figure(each) for each in side.reports[-pairs:]] for side in (ours, peer)]
        for figure in (_ttft_p99, lambda each: each.output_tok_s)
    )
    name = llama_cpp.NAME.replace("llama.cpp", "llama.cpp's server", 1)
    around = surroundings(command)
    rate = Record(
        id=f"server.peer.c{concurrency}.tok_s",
        value=median(result.a),
        unit="tok/s",
        peer=name,
        peer_value=median(result.b),
        ratio=result.ratio(),
        samples=result.samples() | {"output_a": out, "output_b": peer_out},
        **around,
    )
    ttft = Record(
        id=f"server.peer.c{concurrency}.ttft.p99",
        value=median(late),
        unit="ms",
        peer=name,
        peer_value=median(peer_late),
        ratio=median_interval([a / b for a, b in zip(late, peer_late, strict=True)]),
        samples={"a": late, "b": peer_late},
        **around,
    )
    return [rate, ttft]


def _ttft_p99(found: Report) -> float:
    assert found.ttft_ms is not None  # no request has failed
    return found.ttft_ms.p99


def _check(found: Report, shape: Shape) -> None:
    if found.errors:
        raise ConfigError(f"{found.requests - found.completed} of {found.requests} requests failed: {found.errors}")
    did = found.input_tokens, found.cached_tokens, found.output_tokens
    due = found.requests * shape.input_len, 0, found.requests * shape.output_len
    if did != due:
        raise ConfigError(f"a server did other work than the same: prompt, cached and output tokens {did}, not {due}")


if __name__ == "__main__":
    sys.exit(main())
