"""The native test program: every instruction set, with and without sanitizers, and NEON in an emulator."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.kernels import native_build as builds
from tests.kernels.native_attention import Shape, WalkShape, attention_case, block_case, walk_case
from tests.kernels.native_build import Build, run
from tests.kernels.native_cases import Case, linear_case, quantize_case, row_cases, write_cases
from tests.kernels.native_experts import experts_case
from tests.kernels.native_head import few_head_cases, gumbel_case, head_cases, planes_case
from tests.kernels.native_kv import KV, store_case, store_cases
from tests.kernels.tiers import TIERS_HERE
from tests.seeds import SEED
from tokenspeed.kernels.cpu.registration import FORMATS

LITTLE_RANDOMNESS = 28
"""Bits of address randomisation that GCC's thread sanitizer stands."""


def few_cases(rng: np.random.Generator) -> Iterator[Case]:
    for fmt in FORMATS:
        yield linear_case(fmt, 37, 3, 16, rng)
    for n in (1, 15, 31, 33, 100):
        yield from row_cases(n, rng)
    yield quantize_case(64, rng)
    yield from store_cases(rng)
    for kv in KV:
        yield attention_case(Shape(kv=kv), rng)
        yield attention_case(Shape(queries=9, group=7, head_dim=80, page_size=5, first=300, window=100, kv=kv), rng)
        yield attention_case(Shape(queries=3, group=3, head_dim=48, first=70, kv=kv, softcap=1.5), rng)
        yield walk_case(WalkShape((90, 1, 41), 6, 2, 32, 16, 16, 37, kv, normed=True), rng)
    yield from few_head_cases(rng)
    yield block_case("Q8_0", 5, 96, 64, False, rng)
    yield block_case("BF16", 3, 33, 40, True, rng)
    yield experts_case("Q6_K", 7, True, rng)
    yield experts_case("BF16", 5, False, rng)


def all_cases(rng: np.random.Generator) -> Iterator[Case]:
    for fmt, (rows, blocks, count) in product(FORMATS, [(1, 1, 1), (16, 2, 3), (37, 3, 17), (5, 9, 8), (130, 1, 16)]):
        yield linear_case(fmt, rows, blocks, count, rng)
    for n in (*range(1, 50), 63, 64, 65, 127, 128, 129, 255, 256, 640, 1001):
        yield from row_cases(n, rng)
    yield quantize_case(1, rng)
    yield quantize_case(999, rng)
    for queries, group, first, window in product((1, 2, 5, 19), (1, 3, 4, 8), (0, 1, 47, 257), (0, 1, 17, 200)):
        dim, page = int(rng.choice([16, 64, 80, 128, 256])), int(rng.choice([1, 3, 16, 64]))
        yield attention_case(Shape(queries, group, dim, page, first, window, KV[rng.integers(4)]), rng)
    for window, kv, normed in product((0, 37), KV, (False, True)):
        yield walk_case(WalkShape((3, 90), 3, 3, 48, 7, 5, window, kv, normed), rng)
        yield walk_case(WalkShape((66,), 9, 1, 16, 8, 1, window, kv, normed), rng)
    for window, kv in product((0, 37), KV):
        yield walk_case(WalkShape((270, 1, 41), 6, 2, 32, 16, 16, window, kv, normed=window == 0), rng)
    yield from store_cases(rng)
    yield from head_cases(rng)
    for fmt, silu in product(FORMATS, (False, True)):
        size = 256 if fmt.endswith(("_K", "_XS")) else 96
        yield block_case(fmt, 11, size, size, silu, rng)
    for fmt, biased in product(FORMATS, (False, True)):
        yield experts_case(fmt, 13, biased, rng)
    for ff in (1, 8, 15, 48, 50):
        yield block_case("F32", 5, 33, ff, True, rng)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("native") / "few.cases"
    return str(write_cases(path, few_cases(np.random.default_rng(SEED))))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("native") / "all.cases"
    return str(write_cases(path, all_cases(np.random.default_rng(SEED))))


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tenth of all, for programs that are slow."""
    pick = np.random.default_rng(SEED + 1)
    cases = (case for case in all_cases(np.random.default_rng(SEED)) if pick.random() < 0.1)
    return str(write_cases(tmp_path_factory.mktemp("native") / "some.cases", cases))


def without_randomness() -> list[str]:
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    return ["setarch", "-R"] if bits.exists() and int(bits.read_text()) > LITTLE_RANDOMNESS else []


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("isa", TIERS_HERE)
def test_few_cases(few: str, isa: str, seed: int) -> None:
    assert " 0 failed" in run([builds.PLAIN.program(), "run", isa, few])


def test_the_pool_does_every_item_once() -> None:
    assert " 0 failed" in run([builds.PLAIN.program(), "pool"])


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    rng, program = np.random.default_rng(SEED), builds.PLAIN.program()
    cases = [
        linear_case("Q5_K", 3, 1, 2, rng),
        attention_case(Shape(first=20), rng),
        planes_case(18, 2, 2, rng),
        gumbel_case(2, rng),
        store_case("Int8", 48, rng),
        quantize_case(3, rng),
        *row_cases(5, rng),
    ]
    wrong = tmp_path / "wrong.cases"
    for name, items in cases:
        if "expected" in items:
            expected = np.array(items["expected"]).reshape(-1)
            allowed = np.reshape(items.get("allowed", 1), -1)[-1]
            expected[-1] = 0 if np.isnan(expected[-1]) else expected[-1] + expected.dtype.type(2.1 * allowed)
            write_cases(wrong, [(name, {**items, "expected": expected if expected.size > 1 else expected[0]})])
            assert f"FAIL {name}" in run([program, "run", "generic", str(wrong)], expected=1)
    write_cases(wrong, [("new kind", cases[0][1])])
    assert "no such kind" in run([program, "run", "generic", str(wrong)], expected=2)
    assert "no mmx" in run([program, "run", "mmx", str(wrong)], expected=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("isa", TIERS_HERE)
def test_all_cases(everything: str, isa: str, seed: int) -> None:
    assert " 0 failed" in run([builds.RELEASE.program(), "run", isa, everything])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("isa", TIERS_HERE)
def test_memory_is_their_own(some: str, few: str, isa: str, seed: int) -> None:
    for cases in (some, few):
        assert " 0 failed" in run([builds.MEMORY.program(), "run", isa, cases])


@pytest.mark.slow
@pytest.mark.parametrize("isa", TIERS_HERE)
def test_threads_do_not_race(few: str, isa: str) -> None:
    assert " 0 failed" in run([*without_randomness(), builds.THREADS.program(), "run", isa, few])


@pytest.mark.slow
@pytest.mark.parametrize("build", [builds.MEMORY, builds.THREADS], ids=lambda build: build.name)
def test_the_pool_under_sanitizers(build: Build) -> None:
    assert " 0 failed" in run([*without_randomness(), build.program(), "pool"])


@pytest.mark.slow
def test_no_instruction_set_lends_its_functions_to_another() -> None:
    """A weak function is linked once for all who call it: from such a file it would run on processors that cannot."""
    builds.RELEASE.program()
    objects = sorted(builds.RELEASE.folder.rglob("isa_*.o"))
    assert len(objects) == 4
    for path in objects:
        symbols = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        assert [line for line in symbols.splitlines() if line.split()[-2] in "WVu"] == [], path.name


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("cpu, tiers", [("max", ["neon", "generic"]), ("cortex-a72", ["generic"])])
def test_arm(some: str, few: str, cpu: str, tiers: list[str], seed: int) -> None:
    """In an emulator; a Cortex-A72 has no dot products, which the NEON kernels are made of."""
    assert shutil.which("qemu-aarch64"), "needs Debian's qemu-user and g++-aarch64-linux-gnu"
    program = ["qemu-aarch64", "-cpu", cpu, builds.NEON.program()]
    assert run([*program, "tiers"]).split() == tiers
    for isa, cases in product(tiers, (some, few)):
        assert " 0 failed" in run([*program, "run", isa, cases])
    if "neon" not in tiers:
        run([*program, "run", "neon", few], expected=3)
    assert " 0 failed" in run([*program, "pool"])
