"""The reference check, the sanitizer's command and the kernels it watches, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.triton import interpreter  # noqa: F401
from tests.seeds import SEED
from tokenspeed.bench import record
from tokenspeed.bench.gpu import ceilings, graph_timing, reference, sanitize, small_kernels
from tokenspeed.bench.gpu.publish import Publisher
from tokenspeed.contracts.errors import ConfigError, UnsupportedError

ROOT = Path(__file__).resolve().parents[2]


def test_differences_count_what_is_missing_as_the_least() -> None:
    assert reference.differences([(3, -1.0), (4, -2.0), (5, -9.0)], {3: -1.25, 4: -1.5, 8: -6.0}) == [0.25, 0.5, 3.0]


def test_the_reference_file_has_five_best_for_every_token() -> None:
    items = reference.read_items(ROOT / reference.DATA)
    assert items
    for item in items:
        assert len(item.best) == len(item.greedy)
        assert all(len(best) == 5 for best in item.best)
        assert [best[0][0] for best in item.best] == item.greedy


def test_ours_are_read_from_the_first_greedy_token_on() -> None:
    item = reference.Item([1, 2], [7, 8], [[(7, -0.5), (9, -1.0)], [(8, -0.25), (9, -3.0)]])
    told: list[Any] = [None, {2: -9.0}, {7: -0.5, 9: -1.5}, {8: -0.25, 3: -3.5}]
    wrapped = [each and {token: SimpleNamespace(logprob=value) for token, value in each.items()} for each in told]
    asked: list[Any] = []

    def generate(**given: Any) -> list[Any]:
        asked.append(given["prompt_token_ids"])
        return [SimpleNamespace(prompt_logprobs=wrapped)]

    llm: Any = SimpleNamespace(generate=generate)
    assert reference.our_differences(llm, [item]) == [0.0, 0.5, 0.0, 0.5]
    assert asked == [[[1, 2, 7, 8]]]


@pytest.mark.slow
def test_the_demo_model_is_as_near_to_its_reference_as_transformers(
    demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    publisher = Publisher("python -m tokenspeed.bench reference", tmp_path / "cpu.json")
    reference.run_reference(demo_path, "cpu", publisher, tokens=9)
    near, rate = publisher.records
    assert near.id == "cpu.gemma-3-270m.bf16.reference"
    assert near.met()
    assert near.value > 0
    assert rate.value > 0


@pytest.mark.parametrize(
    "output, errors",
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 12 errors\n========= ERROR SUMMARY: 1 error\n", 13),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 2),
        ("========= Error: device not supported\n", None),
    ],
)
def test_the_sanitizers_summary_is_read(output: str, errors: int | None) -> None:
    assert sanitize.count_errors(output) == errors


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command with a stand-in for the sanitizer that prints a text and ends with a status."""

    def run(text: str, status: int = 0) -> tuple[bool, list[record.Record]]:
        script = tmp_path / "compute-sanitizer"
        script.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(sanitize, "machine_name", lambda device: "h200")
        plain = subprocess.run

        def run(command: list[str], **given: Any) -> Any:
            if command[0] == "git":
                return plain(command, **given)
            assert given["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
            alone = command[0] == sys.executable
            return subprocess.CompletedProcess(command, 0, "", "") if alone else plain(command, **given)

        monkeypatch.setattr(subprocess, "run", run)
        publisher = Publisher("python -m tokenspeed.bench sanitize", None)
        return sanitize.run_sanitize(publisher, tmp_path, ["memcheck"]), publisher.records

    return run


def test_clean_dirty_and_refused_runs(watched: Any) -> None:
    clean, found = watched("ERROR SUMMARY: 0 errors")
    assert clean
    assert [(each.id, each.value, each.met()) for each in found] == [("h200.sanitize.memcheck", 0, True)]
    clean, found = watched("ERROR SUMMARY: 3 errors")
    assert not clean
    assert [(each.value, each.met()) for each in found] == [(3, False)]
    for text, status in (("not supported", 1), ("ERROR SUMMARY: 0 errors", 1)):
        assert watched(text, status) == (False, []), "no verdict without a clean end"


def test_a_machine_without_a_sanitizer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sanitize, "PLACES", (Path("/nowhere/compute-sanitizer"),))
    with pytest.raises(UnsupportedError, match="not on this machine"):
        sanitize.find_sanitizer()


SLOW = [pytest.mark.slow]


@pytest.mark.parametrize(
    "group", [pytest.param(name, marks=SLOW if "attention" in name else ()) for name in small_kernels.GROUPS]
)
def test_watched_kernels_run_and_give_finite_results(group: str) -> None:
    found = small_kernels.GROUPS[group]("cpu")
    assert found
    assert all(each.numel() and bool(each.isfinite().all()) for each in found)


def test_a_result_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"good": lambda device: [torch.ones(2)], "bad": lambda device: [torch.ones(2), torch.tensor([torch.inf])]}
    monkeypatch.setattr(small_kernels, "GROUPS", groups)
    assert small_kernels.run("cpu") == small_kernels.run("cpu", ["bad"]) == ["bad"]
    assert small_kernels.run("cpu", ["good"]) == []
    with pytest.raises(ConfigError, match=r"no such group: worse \(known: good, bad\)"):
        small_kernels.run("cpu", ["worse", "bad"])


@pytest.mark.parametrize("programs, block, tiles", [(3, 64, 10), (5, 128, 4)])
def test_reading_reads_everything_once(programs: int, block: int, tiles: int) -> None:
    print(f"seed {SEED}")
    words = torch.randint(-999, 999, (tiles * block,), generator=torch.Generator().manual_seed(SEED)).to(torch.int32)
    sums = ceilings.read_sum(words, programs, block, 4, 2)
    assert sums.tolist() == [int(words.view(tiles, block)[first::programs].sum()) for first in range(programs)]


COMPILED = """
import json, torch
from tests.kernels.triton.compilation import recorded
from tokenspeed.bench.gpu import ceilings, stamps
with recorded("sm_90") as kernels:
    ceilings.read_sum(torch.empty(2**30, dtype=torch.int32, device="meta"), 264, 2048, 4, 4)
    ring = stamps.Ring(torch.device("meta"))
    for which in (stamps.FIRST, stamps.LAST):
        ring.stamp(which)
print(json.dumps([kernel["name"] for kernel in kernels]))
"""


def test_what_measures_compiles_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["_read", "stamp_kernel", "stamp_kernel"]


def test_ids_of_kernel_cases_are_ids(tmp_path: Path) -> None:
    names = ["decode 8b B=1 ctx=1024 page=16 splits=8 usual", "llama-3.1-8b qkv bf16 B1 fused 4x2048 w8 without pdl"]
    graph_timing.write_timed(tmp_path / "k.json", "attention", [(names[0], 4.6e9, 2000.0), (names[1], 0, 5.0)])
    found = record.read(tmp_path / "k.json")
    assert [each.id for each in found] == [
        "cpu.kernels.attention.decode-8b-b-1-ctx-1024-page-16-splits-8-usual",
        "cpu.kernels.attention.llama-3-1-8b-qkv-bf16-b1-fused-4x2048-w8-without-pdl",
    ]
    assert (found[0].floor, found[0].share, found[1].floor) == (1000, 0.5, None)
