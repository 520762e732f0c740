"""The streaming kernels' own sources, run thread by thread on the host, against float64: formats, prologues, rows,
ragged units. On a GPU: `python -m tokenspeed.bench.gpu.chain` and `python -m tokenspeed.bench.gpu.packed --check`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.cuda.emulated import emulate
from tests.seeds import SEED
from tokenspeed.bench.gpu.chain import ready
from tokenspeed.bench.gpu.packed import weight_of
from tokenspeed.kernels.cuda.stream import stream, stream_rows
from tokenspeed.kernels.cuda.stream_tiles import FORMATS, Variant, candidates
from tokenspeed.kernels.triton.operands import Matrix, Norm, Prologue, Rows
from tokenspeed.quantization.fp8 import Fp8Weight, quantize_fp8, quantize_rows

BOUND, REQUANTISED_BOUND = 0.02, 0.06
"""Of |y - exact| / (1 + |exact|); the last bit of a norm may move all roundings to e4m3."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For compiled kernels."""
    return tmp_path_factory.mktemp("emulated")


def matrix(kind: str, rows: int, columns: int) -> Matrix:
    if kind != "fp8":
        return weight_of(kind, rows, columns, "cpu")
    plain = weight_of("bf16", rows, columns, "cpu")
    assert isinstance(plain, torch.Tensor)
    return quantize_fp8(plain)


def prologue_of(kind: str, columns: int) -> Prologue | None:
    norms = [Norm(torch.rand(columns) + 0.5, 1e-5) for _ in range(2)]
    branch = (torch.randn(1, columns) + 0.3).bfloat16()
    made = {"bare": None, "norm": Prologue(norms[0]), "join": Prologue(norms[0], branch)}
    return made[kind] if kind in made else Prologue(norms[0], branch, norms[1])


def exact(entered: torch.Tensor, weight: Matrix, bias: torch.Tensor, act: str) -> torch.Tensor:
    """float64 of rows that are ready."""
    if isinstance(weight, Fp8Weight):
        scale = entered.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448.0
        entered = (entered * (1 / scale)).to(torch.float8_e4m3fn).double() * scale.double()
        values = weight.q.double() * weight.scale.double()[:, None]
    else:
        values = weight.double() if isinstance(weight, torch.Tensor) else weight.dequantized(torch.float64)
    product = entered.double() @ values.T + bias.bfloat16().double()
    if act == "none":
        return product
    gate, up = product.bfloat16().double().chunk(2, dim=1)
    return (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have new tensors hold no numbers."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: real(*a, **k).fill_(torch.nan))


def close(y: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert y.shape == expected.shape
    assert expected.abs().max() > 0.1
    error = ((y.double() - expected).abs() / (1 + expected.abs())).nan_to_num(9e9).max()
    assert error < bound


def one_row(
    kind: str,
    stored: int,
    columns: int,
    act: str,
    prologue: str,
    patch: pytest.MonkeyPatch,
    found: Variant | None = None,
) -> None:
    torch.manual_seed(SEED + stored + columns)
    weight, entering = matrix(kind, stored, columns), prologue_of(prologue, columns)
    x, bias = (torch.randn(1, columns) + 0.3).bfloat16(), torch.randn(stored)
    with patch.context() as poison:
        poisoned(poison)
        made = stream(x, weight, bias, act, entering, found)
    assert made is not None
    entered, total = ready(x, entering)
    again = REQUANTISED_BOUND if kind == "fp8" and entering else BOUND
    close(made[0], exact(entered, weight, bias, act), again)
    if entering is not None and entering.branch is not None:
        assert made[1] is not None
        torch.testing.assert_close(made[1].float(), total.float(), rtol=2**-7, atol=2**-6)
        assert entering.branch_norm is not None or torch.equal(made[1], total)


def several_rows(
    rows: int,
    stored: int,
    columns: int,
    act: str,
    patch: pytest.MonkeyPatch,
    found: Variant | None = None,
    kind: str = "bf16",
) -> None:
    torch.manual_seed(SEED + rows)
    weight = matrix(kind, stored, columns)
    x, bias = torch.randn(rows, columns + 16).bfloat16()[:, :columns], torch.randn(stored)
    x *= torch.rand(rows, 1) + 0.5
    given = Rows(x) if kind == "bf16" or (found and found.quantize) else Rows(*quantize_rows(x))
    with patch.context() as poison:
        poisoned(poison)
        y = stream_rows(given, weight, bias, act, found)
    assert y is not None
    close(y, exact(x.float(), weight, bias, act), BOUND)


@pytest.mark.parametrize(
    ("kind", "stored", "columns", "act", "prologue"),
    [
        ("bf16", 44, 2048, "silu", "join"),
        ("fp8", 21, 1024, "none", "branch norm"),
        ("int8", 36, 1024, "gelu_tanh", "join"),
        ("int4", 44, 4096, "silu", "join"),
        ("int4 half", 30, 7168, "none", "bare"),
        ("mxfp4", 22, 1024, "none", "norm"),
    ],
)
def test_one_row(
    kind: str, stored: int, columns: int, act: str, prologue: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, folder)
    one_row(kind, stored, columns, act, prologue, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prologue", "act"), [("bare", "none"), ("norm", "silu"), ("join", "silu"), ("branch norm", "none")]
)
@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8", "int4", "int4 half", "mxfp4"])
@pytest.mark.parametrize("columns", [1024, 5120])
def test_every_kind_of_one_row(
    kind: str, columns: int, act: str, prologue: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, folder)
    one_row(kind, 76, columns, act, prologue, monkeypatch)


@pytest.mark.parametrize(
    ("rows", "stored", "columns", "act"),
    [(3, 36, 2048, "silu"), (8, 30, 4096, "none"), pytest.param(4, 52, 8192, "silu", marks=pytest.mark.slow)],
)
def test_several_rows(
    rows: int, stored: int, columns: int, act: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, folder)
    several_rows(rows, stored, columns, act, monkeypatch)


@pytest.mark.parametrize(
    ("rows", "warps", "segment"),
    [
        (1, 5, 192),
        pytest.param(1, 3, 64 * 5, marks=pytest.mark.slow),
        pytest.param(3, 5, 192, marks=pytest.mark.slow),
        (7, 3, 64 * 5),
    ],
)
def test_splits(rows: int, warps: int, segment: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row into warps that are no power of two, and segments of an odd number of steps."""
    emulate(monkeypatch, folder)
    columns, act = warps * segment, "silu" if rows % 2 else "none"
    prologue = "join" if rows == 1 else "bare"
    for found in candidates(columns, 0, act, prologue_of(prologue, columns), True, rows):
        if (found.warps, found.segment) == (warps, segment):
            few = replace(found, stages=3)  # which a program's units go round more than once
            if rows == 1:
                one_row("bf16", 44, columns, act, prologue, monkeypatch, few)
            else:
                several_rows(rows, 44, columns, act, monkeypatch, few)
            return
    raise AssertionError("no such split")


@pytest.mark.parametrize(
    ("rows", "columns", "act", "wide", "quantize"),
    [
        pytest.param(3, 1024, "silu", 1, True, marks=pytest.mark.slow),
        (5, 576, "gelu_tanh", 0, False),
        (7, 1024, "silu", 0, True),
        pytest.param(8, 512, "none", 1, False, marks=pytest.mark.slow),
    ],
)
def test_several_rows_of_e4m3(
    rows: int, columns: int, act: str, wide: int, quantize: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rings of few stages, which a program's units go round more than once."""
    emulate(monkeypatch, folder)
    every = candidates(columns, FORMATS[Fp8Weight], act, None, True, rows, quantize)
    found = next(each for each in every if each.wide == wide and columns // each.segment > 1)
    several_rows(rows, 52, columns, act, monkeypatch, replace(found, stages=3), "fp8")


def test_rows_quantised_inside_are_as_those_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: values midway between two of e4m3 go the same way."""
    emulate(monkeypatch, folder)
    torch.manual_seed(SEED)
    x, weight = torch.randn(3, 512).bfloat16(), matrix("fp8", 30, 512)
    x[0, 0], x[0, 1:] = 5, 15 / 64 * 2.0 ** (torch.arange(511) % 4)  # 21, 42 ... times the scale
    y = []
    for given, quantize in ((Rows(x), True), (Rows(*quantize_rows(x)), False)):
        found = next(candidates(512, FORMATS[Fp8Weight], "none", None, False, 3, quantize))
        y.append(stream_rows(given, weight, found=found))
    assert y[0] is not None
    assert y[1] is not None
    assert y[0].abs().max() > 0.1
    assert torch.equal(y[0], y[1])


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "act"), [(2048, "none"), (4096, "silu"), (8192, "silu")])
@pytest.mark.parametrize("rows", [2, 3, 5, 8])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_every_number_of_rows(
    kind: str, rows: int, columns: int, act: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, folder)
    several_rows(rows, 76, columns, act, monkeypatch, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [0, 1])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("rows", [2, 3, 6, 8])
def test_every_way_of_rows_of_e4m3(
    rows: int, quantize: bool, wide: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, folder)
    for found in candidates(1536, FORMATS[Fp8Weight], "silu", None, True, rows, quantize):
        if found.wide == wide and found.warps in (4, 6, 8):
            several_rows(rows, 44, 1536, "silu", monkeypatch, found, "fp8")


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_what_is_no_number_stays_none(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, folder)
    for value in (torch.nan, torch.inf):
        x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(SEED)).bfloat16()
        x[0, SEED % 1024] = value
        made = stream(x, matrix(kind, 8, 1024), None, "none", None)
        assert made is not None
        assert not made[0].isfinite().any()


def test_outliers_cost_the_others_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """x of int4 is rounded within groups of columns: one of 10,000 times the size leaves other groups alone."""
    emulate(monkeypatch, folder)
    g = torch.Generator().manual_seed(SEED)
    x, weight = torch.randn(1, 1024, generator=g).bfloat16(), matrix("int4", 16, 1024)
    x[0, :128] = 0
    x[0, 0] = 10_000
    assert not isinstance(weight, torch.Tensor | Fp8Weight)
    weight.q[:, :16] = -0x77777778  # codes of 0
    made = stream(x, weight, None, "none", None)
    assert made is not None
    close(made[0], exact(x.float(), weight, torch.zeros(16), "none"), 2**-8)
