"""`tokenspeed generate`: complete one prompt, streaming, and say how fast that was."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from tokenspeed.cli.flags import add_engine_flags, add_sampling_flags, engine_settings, read_text, sampling_settings
from tokenspeed.config.settings import flag
from tokenspeed.contracts.errors import ParameterError, PromptError
from tokenspeed.contracts.sampling import SamplingParams

if TYPE_CHECKING:
    from tokenspeed.engine.llm import LLM
    from tokenspeed.engine.output import RequestOutput

DEFAULT_MAX_TOKENS = 128
NO_USE = ("chat_template",)
"""Settings of the engine that a completion has no use for."""


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="complete a prompt",
        description="Complete a prompt, given as an argument, in a file, or on stdin. Text goes to stdout, one line of "
        "timings to stderr. Without --model: Gemma 3 270M.",
    )
    parser.add_argument("prompt", nargs="?", help="the prompt; without it, stdin is read")
    parser.add_argument(
        "-f", "--file", metavar="FILE", help="read the prompt from a file, - is stdin; its last line end is dropped"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of streaming")
    add_sampling_flags(parser)
    add_engine_flags(parser, NO_USE)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Load, stream, report."""
    prompt = _prompt(options)
    settings = sampling_settings(options)
    SamplingParams.from_dict(settings)
    for name in ("logprobs", "prompt_logprobs"):
        if name in settings and not options.json:
            raise ParameterError(f"{flag(name)} needs --json: streamed text has no place for it")
    llm = load_llm(engine_settings(options, NO_USE))
    defaults = {"max_tokens": DEFAULT_MAX_TOKENS} | dict(llm.generation.sampling)
    params = SamplingParams.from_dict(defaults | settings)
    outputs = []
    for text, output in llm.stream(prompt, params):
        outputs = [output]
        if not options.json:
            print(text, end="", flush=True)
    report(llm, outputs[0], options.json)


def measured_timings(llm: LLM, output: RequestOutput) -> dict[str, Any]:
    """`timings` of a request that ran alone, against the ceilings of this machine, which are measured once."""
    from tokenspeed.bench.ceilings import measure_cpu
    from tokenspeed.engine.timings import run_timings
    from tokenspeed.observability.ceilings import read_ceilings

    ceilings = None
    if llm.core.model.device.type == "cpu":
        ceilings = read_ceilings() or measure_cpu()
    return run_timings(llm.core, output, ceilings)


def report(llm: LLM, output: RequestOutput, as_json: bool) -> None:
    """The closing line on stderr, or everything as JSON on stdout."""
    from tokenspeed.engine.timings import timings_line

    timings = measured_timings(llm, output)
    if as_json:
        json.dump(_as_dict(output) | {"timings": timings}, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        print(flush=True)
        print(f"\n{timings_line(timings)}", file=sys.stderr)


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None and options.file is not None:
        raise ParameterError("give the prompt as an argument or with --file, not both")
    prompt: str | None = options.prompt
    if prompt is None:
        if options.file is None and sys.stdin.isatty():
            print("reading the prompt from the terminal; Ctrl-D ends it", file=sys.stderr)
        prompt = read_text(options.file or "-").removesuffix("\n").removesuffix("\r")
    if not prompt:
        raise PromptError("the prompt is empty")
    return prompt


def load_llm(settings: dict[str, Any]) -> LLM:
    """Load a model, with a progress bar on a terminal."""
    from tokenspeed.engine.llm import LLM
    from tokenspeed.observability.loading import LoadingReport

    with LoadingReport() as report:
        return LLM(progress=report, **settings)


def _as_dict(output: RequestOutput) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "logprobs": _logprobs(completion.logprobs),
        "prompt_logprobs": _logprobs(output.prompt_logprobs),
    }


def _logprobs(positions: Any) -> list[Any] | None:
    if positions is None:
        return None
    return [
        None
        if entries is None
        else [
            {"token_id": token, "logprob": found.logprob, "rank": found.rank, "token": found.decoded_token}
            for token, found in entries.items()
        ]
        for entries in positions
    ]
