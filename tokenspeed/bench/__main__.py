"""`python -m tokenspeed.bench COMMAND`: what runs from an unbuilt source tree, with torch, numpy and msgspec alone."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenspeed.bench import record
from tokenspeed.contracts.errors import TokenSpeedError

if TYPE_CHECKING:
    from tokenspeed.bench.gpu.publish import Publisher
    from tokenspeed.bench.gpu.setup import Setup

TABLES = ("attention", "dense", "experts", "memory", "sample")
Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; 1 where something failed, 2 where it was asked for wrongly."""
    options = _parser().parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    run: Command = options.run
    try:
        return run(options)
    except TokenSpeedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    suite = commands.add_parser("gpu-suite", help="every published figure of one GPU, within ten minutes")
    suite.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="for h200.json")
    suite.add_argument("--only", nargs="+", metavar="NAME", help="some of the groups, by name")
    suite.add_argument("--demo", type=Path, metavar="FILE", help="the demo model (default: where make demo puts it)")
    suite.set_defaults(run=_suite)
    _add_models(commands)
    reference = _measuring(commands, "reference", _reference, "the demo model's real weights against log-probabilities")
    reference.add_argument("--model", type=Path, metavar="FILE", help="its .gguf (default: where make demo puts it)")
    kernels = commands.add_parser("kernels", help="tables of single kernels, tile by tile", add_help=False)
    kernels.add_argument("table", choices=TABLES, help="which; what follows is for it, try --help")
    kernels.add_argument("rest", nargs=argparse.REMAINDER)
    kernels.set_defaults(run=_kernels)
    sanitize = commands.add_parser("sanitize", help="compute-sanitizer over small launches of the kernels")
    sanitize.add_argument("--tool", nargs="+", default=["memcheck", "racecheck"], metavar="TOOL")
    sanitize.add_argument("--out", type=Path, metavar="FILE", help="of records to add to")
    sanitize.set_defaults(run=_sanitize)
    _add_verify(commands)
    return parser


def _add_verify(commands: Any) -> None:
    """`tokenspeed verify` from an unbuilt tree."""
    text = "the numbers of a model: kernels, drift, log-probabilities, batch invariance"
    verify = commands.add_parser("verify", help=text, description=text)
    verify.add_argument("model", nargs="?", help="a shipped config, with random weights, or a model's files")
    verify.add_argument("--quantization", metavar="KIND", help="fp8, int8, int4 or mxfp4 (default: as they come)")
    verify.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: auto")
    verify.add_argument("--dtype", default="auto", metavar="TYPE", help="compute type (default: auto)")
    verify.add_argument("--kv-cache-dtype", default="auto", metavar="TYPE", help="of the KV cache (default: auto)")
    verify.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    verify.add_argument("--data-seed", type=int, metavar="N", help="of the random rows and prompts")
    verify.set_defaults(run=_verify)


def _add_models(commands: Any) -> None:
    latency = _measuring(commands, "latency", _latency, "decode and first token, with floors, graphs and kernels")
    _add_model(latency)
    latency.add_argument(
        "--batch", type=_positive, nargs="+", default=[1, 8, 32], metavar="N", help="sequences at once"
    )
    latency.add_argument("--context", type=_positive, default=1024, metavar="N", help="prompt tokens of each")
    latency.add_argument("--tokens", type=_several, default=129, metavar="N", help="drawn by each (default: 129)")
    latency.add_argument("--sampled", action="store_true", help="T 0.7, top-p 0.95, top-k 50 instead of greedy")
    throughput = _measuring(commands, "throughput", _throughput, "many requests at once: tokens per second")
    _add_model(throughput)
    for name, default, text in (
        ("--requests", 256, "how many"),
        ("--input", 1024, "prompt tokens of each"),
        ("--output", 128, "tokens drawn by each"),
        ("--at-once", 128, "most sequences together"),
    ):
        throughput.add_argument(name, type=_positive, default=default, metavar="N", help=f"{text} (default: {default})")
    startup = _measuring(commands, "startup", _startup, "from starting a process to its first token, warm and cold")
    _add_model(startup)
    startup.add_argument("--warm", type=_positive, default=2, metavar="N", help="warm starts (default: 2)")
    loading = _measuring(commands, "loading", _loading, "a checkpoint in the page cache: reading it, and loading it")
    _add_shapes(loading)
    loading.add_argument("--size-gb", type=float, metavar="GB", help="layers to come near (default: all of the model)")
    loading.add_argument("--dir", type=Path, metavar="DIR", help="for the files (default: the system's for such)")
    mixed = _measuring(commands, "mixed", _mixed, "a long prompt that arrives beside decoding streams")
    _add_model(mixed)
    for name, default, text in (
        ("--streams", 8, "sequences that decode"),
        ("--prompt", 8192, "tokens of the prompt"),
        ("--cap", 512, "tokens fed per step"),
    ):
        mixed.add_argument(name, type=_positive, default=default, metavar="N", help=f"{text} (default: {default})")
    mixed.add_argument("--other-caps", type=_positive, nargs="*", default=[2048, 8192], metavar="N", help="alone, too")
    idle = _measuring(commands, "idle", _idle, "time between two decode steps, stamped by the device")
    _add_model(idle)
    idle.add_argument(
        "--batch", type=_positive, metavar="N", help="print each step of so many sequences, and publish nothing"
    )
    idle.add_argument("--context", type=_positive, default=1024, metavar="N", help="of each prompt, with --batch")
    idle.add_argument("--tokens", type=_several, default=129, metavar="N", help="drawn by each, with --batch")


def _measuring(commands: Any, name: str, run: Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of records to add to; by default they are printed")
    parser.set_defaults(run=run)
    return parser


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-3.1-8b", help="a shipped config or a directory; weights are random")


def _add_model(parser: argparse.ArgumentParser) -> None:
    _add_shapes(parser)
    parser.add_argument("--quantization", metavar="KIND", help="fp8, int8, int4 or mxfp4 (default: bf16 weights)")
    parser.add_argument("--router", choices=("uniform",), help="choose experts by seeded noise (default: the model's)")


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _several(text: str) -> int:
    return _at_least(text, 2)


def _at_least(text: str, least: int) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def _setup(options: argparse.Namespace) -> Setup:
    from tokenspeed.bench.gpu.setup import Setup

    return Setup(options.model, options.quantization, options.device, options.router)


def _publisher(options: argparse.Namespace) -> Publisher:
    from tokenspeed.bench.gpu.publish import Publisher

    return Publisher(command_of(options.given), options.out)


def command_of(given: Sequence[str]) -> str:
    """What a reader types to repeat this, without where the results went, and without folders of this machine."""
    return record.command_of("python -m tokenspeed.bench", given)


def _suite(options: argparse.Namespace) -> int:
    from tokenspeed.bench.gpu.suite import run_suite

    return 1 if run_suite(options.out / "h200.json", options.only, options.demo) else 0


def _latency(options: argparse.Namespace) -> int:
    from tokenspeed.bench.gpu.latency import run_latency

    given = options.batch, options.context, options.tokens, options.sampled
    run_latency(_setup(options), *given, _publisher(options))
    return 0


def _throughput(options: argparse.Namespace) -> int:
    from tokenspeed.bench.gpu.throughput import Demand, run_throughput

    at_once = min(options.at_once, options.requests)
    demand = Demand(options.requests, options.input, options.output, at_once)
    run_throughput(_setup(options), demand, _publisher(options))
    return 0


def _startup(options: argparse.Namespace) -> int:
    from tokenspeed.bench.gpu.startup import run_startup

    run_startup(_setup(options), _publisher(options), options.warm)
    return 0


def _loading(options: argparse.Namespace) -> int:
    from tokenspeed.bench.gpu.loading import run_loading

    run_loading(options.model, options.device, _publisher(options), options.dir, options.size_gb)
    return 0


def _mixed(options: argparse.Namespace) -> int:
    from tokenspeed.bench.gpu.mixed import Load, run_mixed

    load = Load(streams=options.streams, prompt=options.prompt, cap=options.cap)
    run_mixed(_setup(options), _publisher(options), load, tuple(options.other_caps))
    return 0


def _idle(options: argparse.Namespace) -> int:
    from tokenspeed.bench.gpu.idle import LENGTH, publish_idle

    setup = _setup(options)
    if options.batch is not None:
        return _timeline(setup, options)
    llm = setup.open(1, LENGTH)
    publish_idle(llm, setup, _publisher(options))
    llm.close()
    return 0


def _timeline(setup: Setup, options: argparse.Namespace) -> int:
    from tokenspeed.bench.gpu.timeline import text, timeline

    llm = setup.open(options.batch, options.context + options.tokens)
    print(text(timeline(llm, options.batch, options.context, options.tokens)))
    llm.close()
    return 0


def _reference(options: argparse.Namespace) -> int:
    from tokenspeed.bench.gpu.reference import run_reference
    from tokenspeed.config.demo import demo_model_path

    run_reference(options.model or demo_model_path(), options.device, _publisher(options))
    return 0


def _kernels(options: argparse.Namespace) -> int:
    run: Callable[[Sequence[str]], int] = importlib.import_module(f"tokenspeed.bench.gpu.{options.table}").main
    return run(options.rest)


def _verify(options: argparse.Namespace) -> int:
    from tokenspeed.bench.verify.run import run_verify
    from tokenspeed.models.registry import shipped_configs

    names = ("model", "quantization", "device", "dtype", "kv_cache_dtype")
    settings = {name: getattr(options, name) for name in names}
    if options.model in shipped_configs() and not Path(options.model).exists():
        settings["load_format"] = "dummy"
    return run_verify(settings, options.data_seed, options.json)


def _sanitize(options: argparse.Namespace) -> int:
    from tokenspeed.bench.gpu.sanitize import run_sanitize

    with tempfile.TemporaryDirectory() as folder:
        return 0 if run_sanitize(_publisher(options), Path(folder), options.tool) else 1


if __name__ == "__main__":
    sys.exit(main())
