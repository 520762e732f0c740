"""`tokenspeed run-batch`: answer a file of OpenAI's batch lines, and go on with it after an interruption."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from tokenspeed.cli.flags import add_engine_flags, engine_settings
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.observability.loading import LoadingReport

if TYPE_CHECKING:
    from tokenspeed.server.batch.run import Tally
    from tokenspeed.server.engine import Engine, Progress, StartEngine


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "run-batch",
        help="answer a file of requests",
        description="Answer OpenAI's batch lines, one JSON object a line with custom_id, method, url and body. Started "
        "again with the same files it goes on where it ended. Status 0: every line has an answer, be it an error. "
        "Without --model: Gemma 3 270M.",
    )
    group = parser.add_argument_group("batch")
    group.add_argument("-i", "--input-file", required=True, metavar="FILE", help="lines to answer, - is stdin")
    group.add_argument(
        "-o",
        "--output-file",
        required=True,
        metavar="FILE",
        help="answers, in the order in which they are ready; those that it holds already are kept; - is stdout",
    )
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        default=[],
        help="names that lines may use, the first one is answered (default: the model as given)",
    )
    group.add_argument(
        "--max-in-flight", type=int, metavar="N", help="most lines under way (default: twice --max-num-seqs)"
    )
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Load, answer, report."""
    config = EngineConfig.from_kwargs(engine_settings(options))
    in_flight = 2 * config.max_num_seqs if options.max_in_flight is None else options.max_in_flight
    if in_flight < 1:
        raise ConfigError(f"--max-in-flight must be at least 1, got {in_flight}")
    source, target = options.input_file, options.output_file
    if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
        raise ConfigError(f"--input-file and --output-file are the same file, {target}")
    from tokenspeed.server.batch.lines import open_lines
    from tokenspeed.server.batch.results import open_results
    from tokenspeed.server.batch.run import BATCH_LIMITS, Tally, run
    from tokenspeed.server.state import ServerState

    read, results = open_lines(source), open_results(target)
    names = tuple(dict.fromkeys(options.served_model_name))
    state = ServerState(names, config.chat_template, limits=BATCH_LIMITS)
    tally, done = Tally(failed=results.num_failed), False
    try:
        with _Bars(os.path.getsize(source) if os.path.isfile(source) else 0) as bars:
            run(state, _starter(config, bars), read, results, tally, in_flight, bars.show)
        done = True
    finally:
        if done or tally.answered or tally.kept:
            print(_summary(tally, done, resumable=target != "-"), file=sys.stderr)


def _starter(config: EngineConfig, bars: _Bars) -> StartEngine:
    from tokenspeed.engine.async_engine import AsyncEngine

    async def start(progress: Progress) -> Engine:
        return await AsyncEngine.start(config, progress=bars.load)

    return start


def _summary(tally: Tally, done: bool, resumable: bool) -> str:
    text = f"{tally.answered + tally.kept} lines answered, {tally.kept} of them before; {tally.failed} with an error"
    return text if done or not resumable else f"{text}; the same command goes on from here"


class _Bars:
    """Progress on stderr: redrawn on a terminal, else a line every ten seconds."""

    def __init__(self, input_bytes: int) -> None:
        """input_bytes: 0 where that is not known."""
        from tqdm import tqdm

        self._input_bytes = input_bytes
        self.load = LoadingReport()
        self._bar = tqdm(desc="answered", unit="line", mininterval=0.2 if sys.stderr.isatty() else 10.0, delay=0.2)

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.load.close()
        self._bar.close()

    def show(self, tally: Tally) -> None:
        """How far the batch is."""
        known = {"input": f"{tally.end / self._input_bytes:.0%}"} if self._input_bytes else {}
        self._bar.set_postfix(**known, errors=tally.failed, refresh=False)
        self._bar.update(tally.answered + tally.kept - self._bar.n)
