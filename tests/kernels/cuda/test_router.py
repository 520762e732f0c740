"""The CUDA router, run thread by thread on the host, against float64, and compiled for Hopper and Blackwell. On a GPU:
`python -m tokenspeed.bench.gpu.experts --check`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.expert_cases import ROUTERS, Router
from tests.kernels.cuda.emulated import EmulatedKernel, on_host
from tests.kernels.cuda.nvrtc import compile_
from tests.kernels.triton.test_router_kernel import check
from tests.seeds import SEED
from tokenspeed.kernels.cuda import registration, router
from tokenspeed.kernels.cuda.router import Variant, fits, route_rows, tokens_of, variant
from tokenspeed.kernels.registry import Registry, Situation
from tokenspeed.kernels.triton import expert_registration
from tokenspeed.kernels.triton.operands import Norm, Prologue
from tokenspeed.kernels.triton.route import Noise
from tokenspeed.ops.definitions import Attrs, Operands

ATTRS: Attrs = {"k": 8, "score": "softmax", "renormalize": True, "groups": 1, "kept_groups": 1, "scale": 1.0}
UNGROUPED = [each for each in ROUTERS if each.attrs["groups"] == 1]
FEW = Variant(
    2048, 128, 8, 8, 8, 1, score=0, renormalize=1, branch=1, branch_norm=0, bias=0, correction=0, noise=0
)  # fmt: skip


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clusters of one program, on the host; five of them, before one has several tokens."""

    def kernel(found: Variant, device: int) -> EmulatedKernel:
        return EmulatedKernel(tmp_path, "router", found.defines(), "run_router.cpp", axis=1)

    on_host(monkeypatch, router, kernel)
    monkeypatch.setattr(router, "PROGRAMS", 5)
    monkeypatch.setattr(router, "MOST_PROGRAMS", 1)
    monkeypatch.setattr(router, "MOST_HELD", 128)
    monkeypatch.setattr(router, "MOST_REGISTERS", 4096)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("case, kind", [(UNGROUPED[4], "norm"), (UNGROUPED[5], "branch")])
def test_routers(case: Router, kind: str) -> None:
    check(case, kind, torch.bfloat16, hidden=328, biased=case.name == "gpt_oss", route=route_rows)


@pytest.mark.usefixtures("host")
def test_a_cluster_has_several_tokens() -> None:
    check(UNGROUPED[4], "join", torch.bfloat16, tokens=9, hidden=328, biased=True, route=route_rows)


@pytest.mark.slow
@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("kind", ["norm", "join", "branch"])
@pytest.mark.parametrize("case", UNGROUPED, ids=lambda case: case.name)
def test_every_router(case: Router, kind: str) -> None:
    for tokens in (5, 17, 21):
        check(case, kind, torch.bfloat16, tokens, hidden=600, biased=case.name == "gpt_oss", route=route_rows)


@pytest.mark.usefixtures("host")
def test_noise_is_that_of_the_triton_kernel() -> None:
    print(f"seed {SEED}")
    g = torch.Generator().manual_seed(SEED)
    x, weight = torch.randn(3, 64, generator=g).bfloat16(), torch.randn(20, 64, generator=g).bfloat16()
    slots, positions = torch.tensor([2, 0, -1], dtype=torch.int32), torch.tensor([70, 5, 9], dtype=torch.int32)
    found = route_rows(
        x, Prologue(Norm(torch.ones(64), 1e-5)), weight, None, None, ATTRS, slots, Noise(positions, 77)
    )  # fmt: skip
    assert found is not None
    for row in range(2):
        expected = sorted(range(20), key=lambda expert: -noise(int(positions[row]), int(slots[row]), 77, expert, 20))
        assert found.ids[row].tolist() == expected[:8]
    assert (found.ids[2] == -1).all()


def noise(position: int, slot: int, seed: int, expert: int, experts: int) -> int:
    """In whole numbers: the steps of `route.scores_of_noise`."""
    bits = ((position * 4096 + slot) * experts + expert) ^ (seed * 0x61C88647)
    bits &= 0xFFFFFFFF
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return (bits ^ (bits >> 16)) >> 8


def compiles(found: Variant, architecture: str) -> None:
    log, ptx = compile_("router", found.defines(), architecture)
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    assert ptx.count("griddepcontrol.wait") == 1
    wait = ptx.index("griddepcontrol.wait")
    weights = re.search(r"ld\.global(\.nc)?\.v[48]\.", ptx)  # sixteen bytes on Hopper, and on Blackwell thirty-two
    assert weights is not None
    assert ptx.index("griddepcontrol.launch_dependents") < weights.start() < wait
    assert wait < ptx.index("st.shared::cluster") < ptx.index("redux.sync.max.u32")
    assert wait < ptx.index("st.global")


def test_hopper_compiles_it() -> None:
    compiles(FEW, "sm_90a")
    compiles(replace(FEW, tokens=4), "sm_90a")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    "shape", [(2048, 128, 8, 8), (2880, 32, 4, 4), (4096, 128, 8, 8), (4096, 8, 2, 1), (2048, 256, 8, 8)]
)
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("score", [0, 1, 2])
@pytest.mark.parametrize("extra", [0, 1])
def test_every_variant_compiles(extra: int, score: int, tokens: int, shape: tuple[int, ...], architecture: str) -> None:
    cols, experts, k, programs = shape
    found = Variant(cols, experts, k, programs, 8, tokens, score, 1 - extra, 1, extra, extra, extra, extra)
    if fits(cols, experts, ATTRS, tokens):
        compiles(found, architecture)
    else:
        assert tokens > 2


def test_shapes_that_are_left_to_the_triton_kernel() -> None:
    prologue = Prologue(Norm(torch.ones(8), 1e-5))

    def taken(cols: int, experts: int, **other: Any) -> bool:
        return variant(cols, experts, {**ATTRS, **other}, prologue, False, False, False) is not None

    assert taken(2048, 128)
    assert not taken(2047, 128)
    assert not taken(8192, 256)
    assert not taken(2048, 128, groups=4)
    assert not taken(2048, 128, k=33)


def test_how_many_tokens_a_cluster_has() -> None:
    for cols, experts, most in ((2048, 128, 4), (2880, 32, 2), (4096, 128, 2), (4096, 8, 1)):
        for tokens in range(1, router.MOST_TOKENS + 1):
            together = tokens_of(tokens, experts)
            assert -(-tokens // together) * router.programs_of(experts) <= router.PROGRAMS
            assert together == 1 or -(-tokens // (together // 2)) * router.programs_of(experts) > router.PROGRAMS
            assert fits(cols, experts, ATTRS, together) == (together <= most)


def test_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "usable", lambda: True)
    monkeypatch.setattr(registration, "hopper", lambda: True)
    registry = Registry()
    expert_registration.register(registry)
    registration.register(registry)
    for attrs, experts, tokens, name in (
        (ATTRS, 128, 16, "cuda.norm_route"),
        (ATTRS, 128, router.MOST_TOKENS, "cuda.norm_route"),
        (ATTRS, 128, router.MOST_TOKENS + 1, None),
        ({**ATTRS, "groups": 8}, 128, 16, "cuda.norm_route"),  # by its twin
        ({**ATTRS, "groups": 8}, 128, 17, None),
        (ATTRS, 2048, 17, None),
    ):
        shapes = ((2048,), (experts, 2048))
        operands = Operands(((tokens, 2048),), ((tokens, 8), (tokens, 8)), ("norm", "gate"), shapes, attrs)
        found = registry.choose("norm_route", operands, Situation("cuda", "bfloat16", tokens, {}))
        assert (found and found.name) == name
