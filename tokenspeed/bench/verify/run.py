"""All checks of one model on one device, in order, as a report."""

from __future__ import annotations

import gc
import json
import random
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokenspeed.bench.record import machine, versions
from tokenspeed.bench.verify import invariance
from tokenspeed.bench.verify.backends import CpuRecords, GpuRecords, Records
from tokenspeed.bench.verify.drift import ROUTED, TIMES, Walked, layer_rows, walk_fast, walk_plain, yardstick_shape
from tokenspeed.bench.verify.kernels import check_kernels, steps_for
from tokenspeed.bench.verify.logprobs import (
    Told,
    ask,
    prompts_for,
    quantized_row,
    sequences_of,
    told_rows,
    walked_row,
)
from tokenspeed.bench.verify.plain import PlainOps
from tokenspeed.bench.verify.steps import Step, step_of
from tokenspeed.bench.verify.table import Report
from tokenspeed.bench.verify.weights import HeldWeights, PackedWeights, Values
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ConfigError, UnsupportedError
from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.llm import LLM
from tokenspeed.runner.cpu_backend import CpuBackend
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.model import LoadedModel, load_model

CACHE_BYTES = 1 << 30
"""Of an engine on a GPU, where nobody asks for another size: the rest is left to float64."""
REQUESTS, LONGEST, DRAWN, MOST = 8, 100, 6, 12
"""Of the checks of batch invariance: requests, their longest prompt, tokens drawn by each, most at once."""
BUDGETS = (256, 24)
"""Most tokens of a step."""


def run_verify(settings: dict[str, Any], seed: int | None = None, out: Path | None = None) -> int:
    """Check, print, and write JSON to `out`; 1 where a bound is broken. settings: keywords of `LLM`.

    Raises the errors of `LLM`, and ConfigError where `out` cannot be written."""
    report = verify(settings, secrets.randbits(32) if seed is None else seed)
    print(f"\n{report.summary()}", flush=True)
    if out is not None:
        try:
            out.write_text(json.dumps(report.as_json(), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {out}: cannot be written ({error.strerror})") from None
    return 0 if report.ok else 1


def verify(settings: dict[str, Any], seed: int) -> Report:
    """All checks of the model that `settings`, keywords of `LLM`, name, on random data of a seed."""
    start = time.monotonic()
    llm = _open(settings)
    core = llm.core
    report = Report(_setting(core, seed))
    print(", ".join(f"{name} {value}" for name, value in report.setting.items() if name not in _LONG), flush=True)
    told, silent = _asked(llm, random.Random(seed), report)
    records, weights = _records(core)
    _check_kernels(report, core, records, weights, seed)
    _check_drift(report, core, records, weights, (told, silent), seed)
    llm.close()
    del llm, core, records, weights
    _free()
    _check_invariance(report, settings, seed)
    report.setting["seconds"] = round(time.monotonic() - start, 1)
    return report


_LONG = ("versions", "machine")


def _setting(core: EngineCore, seed: int) -> dict[str, Any]:
    model = core.model
    return {
        "model": core.files.name,
        "device": model.device.type,
        "backend": core.backend.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(core.kv_dtype).removeprefix("torch."),
        "quantization": core.config.quantization or "none",
        "data-seed": seed,
        "versions": versions(),
        "machine": {name: getattr(machine(), name) for name in ("cpu", "cores", "gpu")},
    }


def _open(settings: dict[str, Any], **more: Any) -> LLM:
    config = EngineConfig.from_kwargs(settings)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    room = {"kv_cache_memory_bytes": CACHE_BYTES} if on_gpu and config.kv_cache_memory_bytes is None else {}
    return LLM(**(settings | room | more))


def _records(core: EngineCore) -> tuple[Records | None, Values]:
    """What runs one by one, and the weights that it stands for."""
    backend, model = core.backend, core.model
    if isinstance(backend, GpuBackend):
        return GpuRecords(backend), HeldWeights(backend.weights)
    if isinstance(backend, CpuBackend):
        return CpuRecords(backend, model), PackedWeights(_packed_again(core, core.config), model.device)
    return None, HeldWeights(backend.weights)


def _packed_again(core: EngineCore, config: EngineConfig) -> Any:
    """The weights as the file has them or as `config` quantises them: a backend may have let go of its own."""
    return _loaded(core, config).packed


def _loaded(core: EngineCore, config: EngineConfig) -> LoadedModel:
    files = core.files
    return load_model(files.definition, None if config.load_format == "dummy" else files.checkpoint, config)


def _asked(llm: LLM, rng: random.Random, report: Report) -> tuple[list[Told], list[Told]]:
    """What the engine tells, and the tokens it draws when it is not asked to tell."""
    shape = llm.core.files.definition.config
    if shape.num_labels or shape.headless:
        report.note("a model without a language model's head: no log-probabilities")
        return [], []
    prompts = prompts_for(llm, rng, llm.core.config.load_format != "dummy")
    return ask(llm, prompts, told=True), ask(llm, prompts, told=False)


def _check_kernels(report: Report, core: EngineCore, records: Records | None, weights: Values, seed: int) -> None:
    if records is None:
        report.note(f"backend {core.backend.name}: plain ops run this model, there is no fast kernel to check")
        return
    context = core.files.definition.config.context
    steps = steps_for(core.page_shape, core.model.device, core.vocab_size, context, seed)
    rows, plain = check_kernels(records, weights, steps, seed)
    report.add(rows)
    if plain:
        report.note(f"plain ops run {', '.join(plain)} here: no fast kernel")


def _check_drift(
    report: Report,
    core: EngineCore,
    records: Records | None,
    weights: Values,
    asked: tuple[list[Told], list[Told]],
    seed: int,
) -> None:
    told, silent = asked
    rng, program = random.Random(seed), core.model.program
    random_tokens = [[rng.randrange(core.vocab_size) for _ in range(20)]]
    sequences = sequences_of([*told, *silent]) or random_tokens
    dtype = torch.bfloat16 if records is not None and core.backend.name == "cpu" else core.model.dtype
    exact = walk_plain(PlainOps(weights, torch.float64), program, _step(core, sequences, torch.float32))
    plain = walk_plain(PlainOps(weights, dtype, rounds=True), program, _step(core, sequences, dtype))
    routed = any(part.op == "route" for record in program.records for part in record.plain())
    by, times = records.by if records else core.backend.name, TIMES[core.backend.name] * (ROUTED if routed else 1)
    if records is not None:
        fast = walk_fast(records, _step(core, sequences, None))
        report.add(layer_rows(exact, plain, fast, by, times, routed))
        if told:
            report.add([walked_row("records one by one", exact, plain, fast, by, times, routed)])
    if told:
        report.add(told_rows(told, silent, sequences, exact, plain, by, times, routed))
    if core.config.quantization is not None and told:
        drawn = core.config.load_format == "dummy"
        report.add([quantized_row(core.config.quantization, exact, _original(core, sequences), by, drawn)])


def _step(core: EngineCore, sequences: list[list[int]], dtype: torch.dtype | None) -> Step:
    """All tokens of the sequences over empty pages, of the engine's type or of another."""
    shape = core.page_shape if dtype is None else yardstick_shape(core.page_shape, dtype)
    return step_of("whole sequences", sequences, [0] * len(sequences), shape, core.model.device, random.Random(0))


def _original(core: EngineCore, sequences: list[list[int]]) -> Walked:
    """Walked by the weights before they were quantised, in float32."""
    packed = _packed_again(core, replace(core.config, quantization=None))
    plain = PlainOps(PackedWeights(packed, core.model.device), torch.float32)
    return walk_plain(plain, core.model.program, _step(core, sequences, torch.float32))


def _check_invariance(report: Report, settings: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    asked: list[invariance.Asked] = []
    expected: list[invariance.Answer] = []
    for budget in BUDGETS:
        try:
            llm = _open(settings, batch_invariant=True, max_num_batched_tokens=budget)
        except UnsupportedError as error:
            report.note(f"batch invariance: {error}")
            return
        shape = llm.core.files.definition.config
        if shape.num_labels or shape.headless:
            report.note("a model without a language model's head: no check of batch invariance")
            return
        if not asked:
            longest = max(1, min(LONGEST, llm.core.capacity.max_model_len - DRAWN - 1))
            asked = invariance.make_requests(REQUESTS, llm.core.vocab_size, longest, DRAWN, rng)
            expected = invariance.run_alone(llm, asked)
        most = min(MOST, llm.core.config.max_num_seqs)
        ways = invariance.check(llm, asked, expected, most, rng)
        records, weights = _records(llm.core)
        by = records.by if records else llm.core.backend.name
        report.add(invariance.invariance_rows(ways, budget, by))
        if isinstance(records, GpuRecords) and budget == BUDGETS[0]:
            _check_kernels(report, llm.core, records, weights, seed)
        llm.close()
        del llm, records, weights
        _free()


def _free() -> None:
    """Give back what a closed engine held; captured steps refer to their executor and it to them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
