"""The load generator's own error: its TTFT and TPOT against those of a server that notes what it did, and against
another load generator on the same server: `python -m tokenspeed.bench.client_error`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

from tokenspeed.bench import guidellm
from tokenspeed.bench.record import Record, Surroundings, Target, command_of, surroundings, write
from tokenspeed.bench.serve import Load, Measured, drive
from tokenspeed.bench.sse_client import Client, Endpoint
from tokenspeed.bench.stats import calibration_loop, median_interval
from tokenspeed.bench.table import line
from tokenspeed.bench.timed_server import Did, timed_server
from tokenspeed.bench.workload import Lengths, Workload
from tokenspeed.contracts.errors import ConfigError, TokenSpeedError

RESULTS = Path("benchmarks/results/client.json")
FIRST_MS, GAP_MS, TOKENS = 50.0, 10.0, 32
SLACK_MS = 0.2
"""An error is allowed this, or SLACK_SHARE of the time itself, whichever is more."""
SLACK_SHARE, AGREE_PERCENT = 0.02, 3.0
_dids = msgspec.json.Decoder(list[Did])


@dataclass(frozen=True)
class Round:
    """Medians of a run in ms: what was measured and what the server did."""

    ttft: float
    tpot: float
    did_ttft: float
    did_tpot: float
    calibration_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, record; 2 where that cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16], metavar="N", help="default: 1 16")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of each concurrency (default: 7)")
    parser.add_argument("--requests", type=int, default=4, metavar="N", help="per stream and round (default: 4)")
    parser.add_argument("--no-peer", action="store_true", help="without guidellm, which is installed on first use")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="of records (default: %(default)s)")
    options = parser.parse_args(arguments)
    command = command_of("python -m tokenspeed.bench.client_error", sys.argv[1:] if arguments is None else arguments)
    try:
        if min(*options.concurrency, options.rounds, options.requests) < 1:
            raise ConfigError("--concurrency, --rounds and --requests must be at least 1")
        peer = None if options.no_peer else guidellm.install()
        for streams in options.concurrency:
            made = run(streams, options.rounds, streams * options.requests, peer, surroundings(command))
            for record in made:
                print(line(record), flush=True)
            write(options.out, made)
    except TokenSpeedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def run(streams: int, rounds: int, requests: int, peer: Path | None, around: Surroundings) -> list[Record]:
    """The records of one concurrency. Raises ConfigError where a request fails."""
    found, others = [], []
    with timed_server(FIRST_MS, GAP_MS) as url:
        one_round(url, streams, streams)  # connections and imports
        for number in range(rounds):
            if peer is not None and number % 2:
                others.append(guidellm.measure(peer, url, streams, requests, TOKENS))
            found.append(one_round(url, streams, requests))
            if peer is not None and number % 2 == 0:
                others.append(guidellm.measure(peer, url, streams, requests, TOKENS))
    made = records(streams, found, around)
    if others:
        made += peer_records(streams, found, others, around)
    return made


def one_round(url: str, streams: int, requests: int) -> Round:
    """`requests` of them, `streams` at once."""
    calibration = calibration_loop()
    measured, did = asyncio.run(_drive(url, streams, requests))
    return compared(measured, did, calibration)


def compared(measured: Sequence[Measured], did: Sequence[Did], calibration_s: float) -> Round:
    """Medians of both sides, in ms. Raises ConfigError where a request failed or the server did other work."""
    errors = [request.error for request in measured if request.error is not None]
    if errors or len(measured) != len(did):
        raise ConfigError(
            f"{len(measured)} requests were sent, {len(did)} answered, {len(errors)} failed: {errors[:1]}"
        )
    tpots = [request.tpot for request in measured if request.tpot is not None]
    sides = [request.ttft for request in measured], tpots, [each.ttft for each in did], [each.tpot for each in did]
    ttft, tpot, did_ttft, did_tpot = (1e3 * median(side) for side in sides)
    return Round(ttft, tpot, did_ttft, did_tpot, calibration_s)


async def _drive(url: str, streams: int, requests: int) -> tuple[list[Measured], list[Did]]:
    client = Client(Endpoint.parse(url))
    work = Workload("completions", "timed", Lengths(20, 20), Lengths(TOKENS, TOKENS))
    try:
        await client.get("/did")
        found = await drive(client, work.path, work.bodies(requests), Load(concurrency=streams))
        return found.requests, _dids.decode(await client.get("/did"))
    finally:
        client.close()


def records(streams: int, rounds: Sequence[Round], around: Surroundings) -> list[Record]:
    """How far the reported medians are from the server's, in ms: the median over rounds, the limit as the target."""
    made = []
    for name in ("ttft", "tpot"):
        said, truth = ([_of(each, f"{prefix}{name}") for each in rounds] for prefix in ("", "did_"))
        errors = [abs(mine - its) for mine, its in zip(said, truth, strict=True)]
        record = Record(
            id=f"client.c{streams}.{name}.error",
            value=median(errors),
            unit="ms",
            target=Target(at_most=max(SLACK_MS, SLACK_SHARE * median(truth))),
            samples={"said": said, "did": truth, "calibration_s": [each.calibration_s for each in rounds]},
            settings={"concurrency": streams, "first_ms": FIRST_MS, "gap_ms": GAP_MS, "tokens": TOKENS},
            **around,
        )
        made.append(record)
    return made


def peer_records(
    streams: int, rounds: Sequence[Round], others: Sequence[guidellm.Said], around: Surroundings
) -> list[Record]:
    """By how many per cent the two generators differ: the median of the rounds' ratios, less one."""
    made = []
    for name, theirs in (("ttft", [each.ttft for each in others]), ("tpot", [each.tpot for each in others])):
        mine = [_of(each, name) for each in rounds]
        ratio = median_interval([a / b for a, b in zip(mine, theirs, strict=True)])
        record = Record(
            id=f"client.c{streams}.{name}.against_guidellm",
            value=100 * abs(ratio.median - 1),
            unit="%",
            target=Target(at_most=AGREE_PERCENT),
            peer=guidellm.NAME,
            ratio=ratio,
            samples={"a": mine, "b": theirs},
            settings={"concurrency": streams, "first_ms": FIRST_MS, "gap_ms": GAP_MS, "tokens": TOKENS},
            **around,
        )
        made.append(record)
    return made


def _of(each: Round, name: str) -> float:
    return {"ttft": each.ttft, "tpot": each.tpot, "did_ttft": each.did_ttft, "did_tpot": each.did_tpot}[name]


if __name__ == "__main__":
    sys.exit(main())
