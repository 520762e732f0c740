"""Projections that follow each other in one kernel: it compiles without spills and asks for weights before it waits.
What it computes is checked on a GPU (`python -m tokenspeed.bench.gpu.chain`)."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cuda.nvrtc import compile_
from tokenspeed.kernels.cuda.chain import SHARED, ChainVariant, Link, chain, variant
from tokenspeed.kernels.triton.operands import Matrix, Norm
from tokenspeed.quantization.fp8 import Fp8Weight

NORM = Norm(torch.ones(1), 1e-5)


def matrix(columns: int, item: int) -> Matrix:
    weight = torch.empty(8, columns, dtype=torch.bfloat16, device="meta")
    return weight if item == 2 else Fp8Weight(weight.to(torch.float8_e4m3fn), torch.empty(8, device="meta"))


def links(hidden: int, ff: int, item: int, last: bool = True, branch_norm: Norm | None = None) -> list[Link]:
    made = [
        Link(matrix(hidden, item)),
        Link(matrix(hidden, item), "silu", NORM, branch_norm),
        Link(matrix(ff, item)),
        Link(matrix(hidden, item), norm=NORM, branch_norm=branch_norm),
    ]
    return made if last else made[:3]


def check(found: ChainVariant | None, architecture: str) -> None:
    assert found is not None
    assert found.shared <= SHARED
    assert found.stages >= (3 if max(found.columns) < 16384 else 2)
    log, ptx = compile_("chain", found.defines(), architecture)
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    wait = ptx.index("griddepcontrol.wait")
    assert ptx.count("griddepcontrol.wait") == 1
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("cp.async.bulk.shared") < wait
    assert ptx.count("ld.acquire.gpu") == len(found.columns) - 1
    assert ptx.count("atom.") == len(found.columns) - 1


@pytest.mark.parametrize(
    ("hidden", "ff", "item", "last"),
    [(4096, 14336, 2, True), (4096, 14336, 1, True), (2048, 8192, 2, False)],
)
def test_hopper_compiles_a_layer(hidden: int, ff: int, item: int, last: bool) -> None:
    check(variant(links(hidden, ff, item, last)), "sm_90a")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("branch_norm", [None, NORM], ids=["", "branch norm"])
@pytest.mark.parametrize("item", [1, 2])
@pytest.mark.parametrize(("hidden", "ff"), [(2048, 8192), (4096, 12288), (4096, 14336), (8192, 16384)])
def test_every_layer_compiles(hidden: int, ff: int, item: int, branch_norm: Norm | None, architecture: str) -> None:
    found = variant(links(hidden, ff, item, branch_norm=branch_norm))
    if item == 2 or hidden >= 4096:
        check(found, architecture)
    else:
        assert found is None


def test_what_does_not_fit_is_left_apart() -> None:
    assert variant(links(1024, 4096, 2)) is None
    assert variant(links(4096, 14400, 1)) is None
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert chain(x, x, links(4096, 14336, 2)[1:]) is None
