"""A server under mixed traffic for some time, and whether it is afterwards what it was before:
`python -m tokenspeed.bench.soak --minutes 20`.

Everything is on this machine: the server is a process of its own and listens on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from tokenspeed.bench.record import Record, command_of, surroundings, write
from tokenspeed.bench.running_server import RunningServer, free_port, our_command, serving
from tokenspeed.bench.serve import first_model
from tokenspeed.bench.soak_clients import Clients, Outcome
from tokenspeed.bench.soak_traffic import Traffic
from tokenspeed.bench.soak_verdict import Minute, minutes_of, verdict
from tokenspeed.bench.soak_watch import Watcher
from tokenspeed.bench.sse_client import Client, Endpoint
from tokenspeed.bench.table import line
from tokenspeed.bench.workload import WORDS
from tokenspeed.config.demo import demo_model_path
from tokenspeed.contracts.errors import ConfigError, TokenSpeedError

RESULTS = Path("benchmarks/results/soak.json")
NUM_SEQS, QUEUE_LEN = 8, 16
BURST = 2 * (NUM_SEQS + QUEUE_LEN)
FLAGS = (
    *("--max-num-seqs", str(NUM_SEQS), "--max-queue-len", str(QUEUE_LEN), "--max-model-len", "1024"),
    *("--kv-cache-memory-bytes", str(128 * 2**20), "--chat-template", "plain", "--log-format", "json"),
)
"""Of the server. A KV cache of this size is used up within minutes: memory that comes later is a leak."""
SAMPLES = 60
"""Looks at the processes per interval."""


@dataclass(frozen=True)
class Plan:
    """seconds: of the traffic. interval: of a row of figures, seconds. at_once: clients that ask without a pause."""

    seconds: float
    interval: float = 60.0
    at_once: int = 6
    burst_s: float = 20.0
    seed: int = 0


@dataclass(frozen=True)
class Soaked:
    """What was seen. left: what the server held after the last client had gone, by name."""

    minutes: list[Minute]
    outcomes: list[Outcome]
    left: dict[str, float]

    @property
    def unexpected(self) -> Counter[str]:
        """How often each thing went wrong."""
        return Counter(f"{each.kind}: {each.unexpected}" for each in self.outcomes if each.unexpected is not None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, record; 1 where the verdict is not good, 2 where there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, metavar="N", help="of traffic (default: 20)")
    parser.add_argument("--interval", type=float, default=60.0, metavar="S", help="of a row of figures (default: 60)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="by default the demo model")
    parser.add_argument("--clients", type=int, default=6, metavar="N", help="that ask without a pause (default: 6)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the traffic (default: 0)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="of records (default: %(default)s)")
    options = parser.parse_args(arguments)
    command = command_of("python -m tokenspeed.bench.soak", sys.argv[1:] if arguments is None else arguments)
    plan = Plan(60 * options.minutes, options.interval, options.clients, seed=options.seed)
    try:
        records = run(options.model or demo_model_path(), plan, command)
    except TokenSpeedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    write(options.out, records)
    return 0 if all(record.met() is not False for record in records) else 1


def run(model: Path, plan: Plan, command: str, flags: Sequence[str] = FLAGS) -> list[Record]:
    """Start a server, soak it, end it; prints a line per interval and the verdict. Raises ConfigError."""
    port = free_port()
    with serving(our_command(port, model, *flags), port) as server:
        soaked = asyncio.run(soak(server, plan))
    for number, minute in enumerate(soaked.minutes, start=1):
        print(_row(number, minute))
    for problem, count in soaked.unexpected.most_common(20):
        print(f"unexpected, {count} times: {problem}")
    found = verdict(soaked.minutes, soaked.unexpected.total(), soaked.left, surroundings(command))
    for record in found:
        print(line(record))
    return found


async def soak(server: RunningServer, plan: Plan) -> Soaked:
    """Put the traffic on a server that runs. Raises ConfigError where it cannot be watched."""
    client, watcher = Client(Endpoint.parse(server.url)), Watcher(server.pid, server.url)
    try:
        traffic = await _traffic(client, server, plan.seed)
        clients = Clients(client, traffic, plan.at_once, BURST, plan.burst_s)
        await watcher.sample()
        files, start = watcher.num_files(), monotonic()
        watching = asyncio.ensure_future(watcher.run(plan.interval / SAMPLES))
        asking = asyncio.ensure_future(clients.run(plan.seconds))
        await asyncio.wait({watching, asking}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            asking.cancel()
            watching.result()
        await asking
        watching.cancel()
        client.close()
        left = await watcher.left()
        left["files"] = float(await _files_left(watcher, files))
        return Soaked(minutes_of(watcher.samples, clients.outcomes, start, plan.interval), clients.outcomes, left)
    finally:
        client.close()
        watcher.close()


async def _files_left(watcher: Watcher, before: int) -> int:
    for _ in range(300):
        if watcher.num_files() <= before:
            return 0
        await asyncio.sleep(0.1)
    return watcher.num_files() - before


async def _traffic(client: Client, server: RunningServer, seed: int) -> Traffic:
    name = await first_model(client)
    listed: Any = msgspec.json.decode(await client.get("/models"))
    model_len = listed["data"][0]["max_model_len"]
    endpoint = Endpoint(client.endpoint.host, client.endpoint.port, "", False)
    asked = endpoint.request("POST", "/tokenize", msgspec.json.encode({"prompt": " ".join(WORDS.split())}))
    tokens: Any = msgspec.json.decode(await client.post(asked))
    if not tokens["count"]:
        raise ConfigError("the model's tokenizer makes no tokens of words")
    return Traffic(name, model_len, tokens["count"] / len(WORDS.split()), seed)


def _row(number: int, minute: Minute) -> str:
    ended = ", ".join(f"{count} {label}" for label, count in sorted(minute.labels.items()))
    return (
        f"{number:3} server {minute.server_mib:.1f} MiB, engine {minute.engine_mib:.1f} MiB, {minute.files:.0f} files, "
        f"{minute.pages:.0f} pages; TTFT {minute.ttft_p50:.0f} and {minute.ttft_p99:.0f} ms, ITL {minute.itl_p50:.1f} "
        f"and {minute.itl_p99:.1f} ms (p50, p99); {ended}; {minute.unexpected} unexpected"
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
