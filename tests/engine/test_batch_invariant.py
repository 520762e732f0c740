"""Batch-invariant mode on the CPU: bit-equal ids and log-probabilities, and refusals where nobody can promise them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.parity_tools import CASES, make_gguf
from tests.seeds import SEED
from tokenspeed.bench.verify.invariance import Asked, different, make_requests, run, run_after_hit, run_alone, run_mixed
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.engine import core
from tokenspeed.engine.llm import LLM
from tokenspeed.runner import build

SETTINGS: dict[str, Any] = {"max_model_len": 110, "kv_cache_memory_bytes": 64 << 20, "batch_invariant": True}


Engines = dict[int, LLM]
"""By the most tokens of a step."""


def engines_of(path: Path) -> Iterator[Engines]:
    engines = {budget: LLM(str(path), max_num_batched_tokens=budget, **SETTINGS) for budget in (512, 23)}
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module", params=["gemma3", "gpt_oss", "glm4_moe"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Windowed layers, experts, three formats."""
    made = make_gguf(CASES[request.param].with_k_widths(), "K", tmp_path_factory.mktemp("tiny") / "model.gguf")
    yield from engines_of(made.path)


@pytest.fixture(scope="module")
def demo(demo_path: Path) -> Iterator[Engines]:
    yield from engines_of(demo_path)


def asked_of(llm: LLM, seed: int, count: int) -> list[Asked]:
    return make_requests(count, llm.core.vocab_size, 90, 6, random.Random(seed))


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("count, most", [(6, 9)])
def test_bits_do_not_depend_on_what_else_runs(tiny: Engines, seed: int, count: int, most: int) -> None:
    check_every_way(tiny, seed, count, most)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED])
def test_twenty_requests_to_the_demo_model_in_up_to_64(demo: Engines, seed: int) -> None:
    check_every_way(demo, seed, 20, 64)


def check_every_way(engines: Engines, seed: int, count: int, most: int) -> None:
    whole, chunked = engines.values()
    asked, rng = asked_of(whole, seed, count), random.Random(seed)
    expected = run_alone(whole, asked)
    assert len({answer.token_ids[0] for answer in expected}) > 1
    silent = [one.silent() for one in asked]
    ways = {
        "chunks": different(expected, iter(enumerate(run_alone(chunked, asked)))),
        "mixed": different(expected, run_mixed(whole, asked, most, rng)),
        "mixed chunks": different(expected, run_mixed(chunked, asked, most, rng)),
        "silent": different(expected, iter(enumerate(run(whole, silent)))),
        "prefix": different(expected, run_after_hit(whole, asked)),
    }
    assert {name: way["different"] for name, way in ways.items()} == {name: [] for name in ways}
    assert all(way["compared"] == count for way in ways.values())
    assert ways["prefix"]["cached_tokens"] > 0


def test_a_difference_is_seen(tiny: Engines) -> None:
    llm = tiny[512]
    first, second = asked_of(llm, SEED, 2)
    expected = run_alone(llm, [first])
    changed = Asked([*first.prompt, 5], first.params)
    assert different(expected, iter([(0, run(llm, [changed])[0])]))["different"] == [0]
    told = expected[0].logprobs
    assert told is not None
    told[3][0] = (told[3][0][0], told[3][0][1] * (1 + 2e-16), told[3][0][2])
    assert different(expected, iter([(0, run_alone(llm, [first])[0])]))["different"] == [0]
    assert different(run_alone(llm, [second]), iter([(0, run(llm, [second.silent()])[0])]))["different"] == []


def test_the_reference_is_refused(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"--batch-invariant: the reference backend \(ref\).*--dtype float32"):
        LLM(str(tiny_path), dtype="float32", batch_invariant=True)
    with pytest.raises(UnsupportedError, match=r"no fast kernel for: head_dim 8"):
        LLM(str(tiny_path), batch_invariant=True)
    monkeypatch.setattr(build, "extension_available", lambda: False)
    with pytest.raises(UnsupportedError, match="extension is not built"):
        LLM(str(tiny_path), batch_invariant=True)
    LLM(str(tiny_path), max_model_len=16).close()


def test_pages_of_one_mode_are_not_those_of_the_other(tiny: Engines) -> None:
    config, files = tiny[512].config, tiny[512].core.files
    prepared = build.prepare(files, config)
    on, off = (core._root(files, prepared, replace(config, batch_invariant=mode)) for mode in (True, False))
    assert on != off
    assert on == core._root(files, prepared, config)
