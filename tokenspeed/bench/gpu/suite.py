"""`gpu-suite`: every published figure of one GPU, the most important first, each written as soon as it is measured.

Random weights of real shapes and distinct prompts, but for the reference check. Within ten minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenspeed.bench.gpu import idle, mixed
from tokenspeed.bench.gpu.ceilings import measured
from tokenspeed.bench.gpu.decode import TOKENS
from tokenspeed.bench.gpu.latency import USUAL_CONTEXT, Measurement, length_for
from tokenspeed.bench.gpu.publish import Publisher
from tokenspeed.bench.gpu.reference import run_reference
from tokenspeed.bench.gpu.setup import Setup, free_memory, machine_name
from tokenspeed.bench.gpu.startup import run_startup
from tokenspeed.config.demo import demo_model_path
from tokenspeed.contracts.errors import ConfigError, TokenSpeedError

COMMAND = "python -m tokenspeed.bench gpu-suite"


@dataclass(frozen=True)
class Rows:
    """Decode rows that share one loaded model, each greedy and sampled, with its graph's time; and its idle times."""

    model: str
    quantization: str | None
    batches: tuple[int, ...]
    router: str | None = None
    sampled: bool = True

    def run(self, publisher: Publisher) -> None:
        """Measure and publish."""
        setup = Setup(self.model, self.quantization, router=self.router)
        length = max(length_for(USUAL_CONTEXT, TOKENS), idle.LENGTH)
        measurement = Measurement.opened(setup, max(self.batches), length, publisher)
        for batch in self.batches:
            plain = measurement.decode(batch, USUAL_CONTEXT)
            if batch == 1:
                measurement.first(plain)
            measurement.graph(plain)
            if self.sampled:
                measurement.decode(batch, USUAL_CONTEXT, plain=plain)
        idle.publish_idle(measurement.llm, setup, publisher)
        measurement.llm.close()


@dataclass(frozen=True)
class Contexts:
    """Decode rows of one sequence at several lengths, by one loaded model."""

    model: str
    contexts: tuple[int, ...] = (128, 8192, 32768)
    quantization: str | None = None

    def run(self, publisher: Publisher) -> None:
        """Measure and publish."""
        setup = Setup(self.model, self.quantization)
        length = length_for(max(self.contexts), TOKENS)
        measurement = Measurement.opened(setup, 1, length, publisher)
        for context in self.contexts:
            measurement.decode(1, context)
        measurement.llm.close()


def _ceilings(publisher: Publisher) -> None:
    found, name = measured(), machine_name("cuda")
    publisher.add(f"{name}.ceiling.read", found.read_gbs, "GB/s")
    publisher.add(f"{name}.ceiling.bf16", found.bf16_tflops, "TFLOP/s")
    publisher.add(f"{name}.ceiling.fp8", found.fp8_tflops, "TFLOP/s")


GROUPS: dict[str, Callable[[Publisher], None]] = {
    "ceilings": _ceilings,
    "8b": Rows("llama-3.1-8b", None, (1, 8, 32, 128)).run,
    "8b-fp8": Rows("llama-3.1-8b", "fp8", (1, 32, 128)).run,
    "8b-int4": Rows("llama-3.1-8b", "int4", (1,)).run,
    "1b": Rows("llama-3.2-1b", None, (1, 8, 32, 128)).run,
    "mixed": lambda publisher: mixed.run_mixed(Setup("llama-3.1-8b"), publisher),
    "start": lambda publisher: run_startup(Setup("llama-3.1-8b"), publisher),
    "8b-contexts": Contexts("llama-3.1-8b").run,
    "8b-fp8-contexts": Contexts("llama-3.1-8b", (8192, 32768), "fp8").run,
    "1b-contexts": Contexts("llama-3.2-1b").run,
}
"""By name, in order of importance; a last one, reference, needs the demo model's file."""
REFERENCE = "reference"
BY_NAME: dict[str, Callable[[Publisher], None]] = {
    "30b-a3b": Rows("qwen3-30b-a3b", None, (1, 8, 32, 128), "uniform", sampled=False).run,
    "30b-a3b-fp8": Rows("qwen3-30b-a3b", "fp8", (1, 8, 32, 128), "uniform", sampled=False).run,
    "gpt-oss-20b": Rows("gpt-oss-20b", None, (1, 8, 32, 128), "uniform", sampled=False).run,
}
"""Groups that run only where they are asked for, as with them all would take more than ten minutes."""


def run_suite(out: Path, only: Sequence[str] | None = None, demo: Path | None = None) -> list[str]:
    """Run groups, by default all but those of BY_NAME; the names of those that failed, whose errors are printed. demo:
    the demo model's file, by default where `make demo` puts it; without it that group is left out, which is said.

    Raises ConfigError for an unknown group.
    """
    usual = GROUPS | {REFERENCE: lambda publisher: _reference(publisher, demo)}
    groups = usual | BY_NAME
    unknown = sorted(set(only or ()) - set(groups))
    if unknown:
        raise ConfigError(f"no such group: {', '.join(unknown)} (known: {', '.join(groups)})")
    publisher, started, failed = Publisher(COMMAND, out), time.perf_counter(), []
    for name in only or usual:
        begun = time.perf_counter()
        try:
            groups[name](publisher)
        except Exception as error:  # what comes after is still worth measuring
            failed.append(name)
            print(f"{name} FAILED: {type(error).__name__}: {error}", flush=True)
        free_memory("cuda")
        print(f"-- {name}: {time.perf_counter() - begun:.0f} s", flush=True)
    print(_summary(publisher, time.perf_counter() - started, failed), flush=True)
    return failed


def _summary(publisher: Publisher, seconds: float, failed: Sequence[str]) -> str:
    verdicts = [record.met() for record in publisher.records]
    missed = [record.id for record in publisher.records if record.met() is False]
    lines = [f"{len(verdicts)} figures in {seconds:.0f} s: {verdicts.count(True)} met, {len(missed)} missed", *missed]
    return "\n".join([*lines, *(f"failed: {name}" for name in failed)])


def _reference(publisher: Publisher, demo: Path | None) -> None:
    try:
        path = demo or demo_model_path()
    except TokenSpeedError as error:
        print(f"{REFERENCE} left out: {error}")
        return
    run_reference(path, "cuda", publisher)
