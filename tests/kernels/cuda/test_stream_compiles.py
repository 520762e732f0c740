"""The streaming projection compiles for Hopper and Blackwell without spills, and asks for weights before it waits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.nvrtc import compile_
from tokenspeed.contracts.errors import DeviceError
from tokenspeed.kernels.cuda import program, registration
from tokenspeed.kernels.cuda.stream import stream, stream_rows
from tokenspeed.kernels.cuda.stream_tiles import (
    ALONE,
    BITS,
    FORMATS,
    LEAST_STAGES,
    MOST_QUANTIZED,
    MOST_ROWS,
    SHARED,
    STEP,
    UNIT,
    Variant,
    candidates,
    variant,
)
from tokenspeed.kernels.triton.operands import Matrix, Norm, Prologue, Rows
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.int4 import Int4Weight, int4_weight, quantize_int4
from tokenspeed.quantization.int8 import Int8Weight
from tokenspeed.quantization.mxfp4 import Mxfp4Weight, quantize_mxfp4

NORM = Norm(torch.ones(1), 1e-5)
PROLOGUES = {
    "bare": None,
    "norm": Prologue(NORM),
    "join": Prologue(NORM, torch.ones(1)),
    "branch norm": Prologue(NORM, torch.ones(1), NORM),
}


BF16, E4M3, INT8, INT4, MXFP4 = (
    FORMATS[kind] for kind in (torch.Tensor, Fp8Weight, Int8Weight, Int4Weight, Mxfp4Weight)
)


WIDE, HALF = (f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}" for kind in ("bf16", "f16"))
WHOLE = "mma.sync.aligned.m16n8k32.row.col.s32.s8"
PRODUCTS = {BF16: (WIDE, 2), E4M3: (HALF, 2), INT8: (WHOLE, 1), INT4: (WHOLE, 2), MXFP4: (WIDE, 4)}
"""What multiplies 64 bytes of 8 rows, and how often."""


def check(found: Variant, compiled: tuple[str, str]) -> None:
    log, ptx = compiled
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    wait = ptx.index("griddepcontrol.wait")
    assert ptx.count("griddepcontrol.wait") == 1
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("cp.async.bulk.shared") < wait
    steps = found.segment // STEP // (found.warps if found.narrow else 1)
    mine, per_step = PRODUCTS[found.format]
    for instruction in (WIDE, HALF, WHOLE):
        assert (ptx.count(instruction) > 0) == (instruction == mine)
    assert ptx.count(mine) % (per_step * steps) == 0  # loops over few segments are unrolled
    # Scales of groups are asked for with the weights, also before the wait.
    grouped = found.format in (INT4, MXFP4)
    assert ("cp.async.ca.shared.global" in ptx) == ("cp.async.mbarrier.arrive.noinc" in ptx) == grouped
    assert not grouped or ptx.index("cp.async.ca.shared.global") < wait
    # One warp asks for narrow weights, by a thread that the hardware picks: no loop over threads.
    assert (ptx.count("elect.sync") > 0) == found.narrow
    assert ptx.count("cp.async.bulk.shared") % (UNIT if found.narrow else 1) == 0
    # Programs of a cluster have set up the barrier that counts their sums before one waits.
    assert ("st.async.shared::cluster" in ptx) == ("barrier.cluster" in ptx) == (found.cluster > 1)
    assert found.cluster == 1 or ptx.index("mbarrier.init") < ptx.index("barrier.cluster.arrive") < wait
    # Codes become bytes or bf16 by a shift and a mask each: but for sums, nothing is converted.
    if found.format == MXFP4:
        assert "cvt.rn.f32" not in ptx.replace("cvt.rn.f32.bf16", "")
    if found.format in (INT8, INT4):
        assert ptx.count("cvt.rn.f32.s32") == ptx.count(mine) // per_step


@pytest.mark.parametrize("fmt", FORMATS.values())
@pytest.mark.parametrize(
    ("columns", "prologue", "act"),
    [(4096, "join", "silu"), (14336, "bare", "none"), (2048, "branch norm", "gelu_tanh"), (640, "norm", "none")],
)
def test_hopper(columns: int, prologue: str, act: str, fmt: int) -> None:
    found = variant(columns, fmt, act, PROLOGUES[prologue], bias=act == "none")
    if fmt == BF16 and columns == 640:
        assert found is None
        return
    assert found is not None
    check(found, compile_(found.source, found.defines(), "sm_90a"))


@pytest.mark.parametrize(
    ("columns", "rows", "warps", "segment"),
    [(2880, 1, 5, 576), (3840, 1, 10, 256), (5376, 1, 7, 256), (2880, 2, 6, 320), (2880, 4, 6, 320), (2880, 8, 6, 320)],
)
def test_rows_that_eight_warps_do_not_divide(columns: int, rows: int, warps: int, segment: int) -> None:
    found = variant(columns, BF16, "none", PROLOGUES["join" if rows == 1 else "bare"], bias=True, rows=rows)
    assert found is not None
    assert (found.warps, found.segment) == (warps, segment)
    assert found.stages >= LEAST_STAGES
    check(found, compile_(found.source, found.defines(), "sm_90a"))
    assert variant(5376, BF16, "none", None, bias=True, rows=2) is None


@pytest.mark.parametrize(("prologue", "rows"), [("join", 1), ("bare", 2), ("bare", 8)])
def test_other_splits_of_a_row(prologue: str, rows: int) -> None:
    """2880 columns are 45 lines of 128 bytes: few warps have long segments, and those may be half a line more."""
    found = list(candidates(2880, BF16, "none", PROLOGUES[prologue], True, rows))
    splits = {(each.warps, each.segment) for each in found}
    assert {(5, 384), (9, 128), (15, 128), (6, 320), (10, 192), (3, 640)} <= splits
    assert all(2880 * 2 % (each.warps * each.segment) == 0 for each in found)
    assert all(each.shared <= SHARED and each.stages >= LEAST_STAGES - 1 for each in found)
    for each in found:
        if (each.warps, each.segment) in {(5, 384), (6, 320)}:
            check(each, compile_(each.source, each.defines(), "sm_90a"))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [BF16, E4M3])
@pytest.mark.parametrize("columns", [2048, 2880, 4096, 14336])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_every_split_of_a_row(rows: int, columns: int, fmt: int) -> None:
    """More warps leave a thread 64 registers: only to be timed."""
    for found in candidates(columns, fmt, "silu", None, True, rows):
        if found.warps <= 10:
            check(found, compile_(found.source, found.defines(), "sm_90a"))


def test_scales_of_files() -> None:
    """float16 ones are widened, each once for its 32 codes and thread."""
    found = variant(4096, INT4, "silu", PROLOGUES["join"], bias=False, half_scales=True)
    plain = variant(4096, INT4, "silu", PROLOGUES["join"], bias=False)
    assert found is not None
    assert plain is not None
    log, ptx = compile_(found.source, found.defines(), "sm_90a")
    check(found, (log, ptx))
    assert ptx.count("cvt.f32.f16") % (found.segment // STEP // found.warps) == 0
    assert "cvt.f32.f16" in ptx
    assert "cvt.f32.f16" not in compile_(plain.source, plain.defines(), "sm_90a")[1]


@pytest.mark.parametrize(
    ("rows", "columns", "act", "cluster", "programs"),
    [
        (2, 14336, "silu", 2, 2), (3, 2048, "none", 1, 2), (8, 4096, "silu", 1, 1), (8, 4096, "none", 2, 2),
        (7, 5120, "none", 2, 2), (2, 8192, "none", 1, 2), (8, 8192, "silu", 2, 2), (3, 10240, "silu", 2, 2),
        (8, 14336, "none", 2, 1),
    ],
)  # fmt: skip
def test_several_rows(rows: int, columns: int, act: str, cluster: int, programs: int) -> None:
    found = variant(columns, BF16, act, None, bias=True, rows=rows)
    assert found is not None
    assert (found.rows, found.segment) == (1 << (rows - 1).bit_length(), 256)
    assert (found.cluster, found.programs) == (cluster, programs)
    assert found.shared <= (ALONE if programs == 1 else SHARED)
    check(found, compile_(found.source, found.defines(), "sm_90a"))
    assert variant(columns, INT4, "silu", None, bias=True, rows=rows) is None
    assert variant(columns, BF16, "silu", None, bias=True, rows=MOST_ROWS + 1) is None


@pytest.mark.parametrize("wide", [0, 1])
@pytest.mark.parametrize("rows", [2, 4, 8])
def test_several_rows_of_e4m3(rows: int, wide: int) -> None:
    """Codes of W are widened once for all rows; those of x for each unit, unless shared memory has float16."""
    found = next(each for each in candidates(2048, E4M3, "silu", None, True, rows) if each.wide == wide)
    assert (found.warps, found.segment) == (4, 256)
    compiled = compile_(found.source, found.defines(), "sm_90a")
    check(found, compiled)
    ptx = compiled[1][compiled[1].index("mbarrier.try_wait") :]
    products = ptx.count(HALF)
    widened = ptx.count("cvt.rn.f16x2.e4m3x2")
    assert products > 0
    assert widened == products * (4 if rows < 8 else 2) + (0 if wide else 2 * products)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(2, 2048), (3, 4096), (8, 2048), (8, 4096), (5, 14336)])
def test_variants_of_several_rows_of_e4m3(rows: int, columns: int, quantize: bool) -> None:
    found = variant(columns, E4M3, "none", None, True, rows, quantize=quantize)
    if quantize and rows * columns > MOST_QUANTIZED:
        assert found is None
        return
    if columns > 8192:
        assert found is None
        return
    assert found is not None
    assert (found.rows, found.quantize, found.programs) == (1 << (rows - 1).bit_length(), quantize, 2)
    check(found, compile_(found.source, found.defines(), "sm_90a"))
    assert variant(columns, E4M3, "none", None, True, MOST_ROWS + 1, quantize=quantize) is None


@pytest.mark.parametrize(("rows", "columns"), [(2, 8192), (4, 4096), (8, 2048)])
def test_several_rows_quantised(rows: int, columns: int) -> None:
    found = [each for each in candidates(columns, E4M3, "none", None, True, rows, True) if each.segment == 2048]
    assert {each.warps for each in found} <= {4, 8, 16}
    assert {each.wide for each in found} == {0, 1}
    eight = next(each for each in found if each.warps == 8)
    compiled = compile_(eight.source, eight.defines(), "sm_90a")
    check(eight, compiled)
    assert compiled[1].index("griddepcontrol.wait") < compiled[1].index("cvt.rn.satfinite.e4m3x2")
    assert not list(candidates(14336, E4M3, "none", None, True, 4, True))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("act", ["none", "silu", "gelu_tanh"])
@pytest.mark.parametrize("columns", [2048, 3072, 4096, 5120, 8192, 14336])
@pytest.mark.parametrize("rows", [2, 4, 8])
def test_every_variant_of_several_rows(rows: int, columns: int, act: str, architecture: str) -> None:
    found = variant(columns, BF16, act, None, True, rows)
    if found is not None:
        check(found, compile_(found.source, found.defines(), architecture))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "architecture"),
    [(each, "sm_90a") for each in (1024, 2048, 3072, 4096, 5120, 8192, 14336, 16384)]
    + [(each, "sm_100a") for each in (2048, 5120, 14336)],
)
@pytest.mark.parametrize("fmt", FORMATS.values())
@pytest.mark.parametrize("act", ["none", "silu", "gelu_tanh"])
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_every_variant(columns: int, prologue: str, act: str, fmt: int, architecture: str) -> None:
    found = variant(columns, fmt, act, PROLOGUES[prologue], bias=True)
    if found is not None:
        check(found, compile_(found.source, found.defines(), architecture))


@pytest.mark.parametrize("fmt", FORMATS.values())
def test_two_programs_fit_a_processor(fmt: int) -> None:
    found = [variant(columns, fmt, "none", PROLOGUES["join"], True) for columns in range(64, 9000, 64)]
    fitting = [each for each in found if each is not None]
    assert len(fitting) >= 8
    for each in fitting:
        assert each.shared <= SHARED
        assert each.k * BITS[fmt] // 8 % (each.segment * (1 if each.narrow else each.warps)) == 0
        assert each.segment % (STEP * (each.warps if each.narrow else 1)) == 0
        assert each.stages >= 2


def test_rings_hold_no_more_than_a_program_multiplies() -> None:
    short = variant(4096, INT4, "none", None, False)
    assert short is not None
    assert short.stages > 3
    one, many = short.holding(1), short.holding(99)
    assert many == short
    assert one.stages * one.segment * 2 == short.k
    assert one.shared < short.shared
    check(one, compile_(one.source, one.defines(), "sm_90a"))
    shared = variant(8192, BF16, "none", None, False, rows=8)
    assert shared is not None
    assert (shared.stages, shared.holding(1)) == (2, shared)
    long = variant(4096, E4M3, "none", None, False)
    assert long is not None
    # Two and three units of 32 KiB are few for a program, four more than it could hold; one comes before its wait.
    assert [long.holding(units).stages for units in (1, 2, 3, 4)] == [2, 3, 3, long.stages]


def test_what_no_tile_fits_is_left_to_the_twin() -> None:
    x, weight = torch.ones(1, 1000, dtype=torch.bfloat16), torch.ones(8, 1000, dtype=torch.bfloat16)
    assert stream(x, weight) is None
    blocks = Fp8Weight(torch.ones(128, 4096).to(torch.float8_e4m3fn), torch.ones(1, 32))
    assert stream(torch.ones(1, 4096, dtype=torch.bfloat16), blocks) is None
    group = torch.ones(6, 1024)
    one = torch.ones(1, 1024, dtype=torch.bfloat16)
    for odd_rows in (quantize_int4(group[:5]), quantize_mxfp4(group[:5])):
        assert stream(one, odd_rows) is None
    for odd_halves in (quantize_int4(group), quantize_mxfp4(group)):
        assert stream(one, odd_halves, act="silu") is None
    codes, ours = torch.ones(6, 1024), torch.ones(6, 8).bfloat16()
    zeros = int4_weight(codes, ours, torch.ones(6, 8))
    for other in (zeros, int4_weight(codes, ours.float()), int4_weight(codes, ours.repeat_interleave(2, 1))):
        assert stream(one, other) is None
    odd = torch.ones(1, 4104, dtype=torch.bfloat16)[:, 4:4100]
    assert odd.data_ptr() % 16 == 8
    assert stream(odd, torch.ones(8, 4096, dtype=torch.bfloat16)) is None


def test_several_rows_are_asked_of_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(16, 64, dtype=torch.bfloat16)
    asked: list[Rows] = []

    def answer(rows: Rows, weight: Matrix, bias: torch.Tensor | None, act: str) -> torch.Tensor:
        asked.append(rows)
        return torch.full((3, 8), 7.0)

    monkeypatch.setattr(registration, "stream_rows", answer)
    prologue = Prologue(Norm(torch.ones(64), 1e-5), x)
    y, joined = registration.stream_or_project(x, weight, None, "silu", prologue)
    assert (y == 7).all()
    assert joined is not None
    assert torch.equal(joined, x + x)
    assert asked[0].values.float().pow(2).mean(-1).sub(1).abs().max() < 0.02
    assert stream_rows(asked[0], weight) is None
    # Rows that nothing is done to before are quantised by the kernel, so they come as they are.
    y, joined = registration.stream_or_project(x, weight, None, "silu", None)
    assert asked[1] == Rows(x)
    assert joined is None
    assert (y == 7).all()


def test_rows_that_do_not_go_with_a_weight_are_left_to_the_twin() -> None:
    x, plain = torch.ones(2, 2048, dtype=torch.bfloat16), torch.ones(8, 2048, dtype=torch.bfloat16)
    codes, scale = torch.ones(2, 2048).to(torch.float8_e4m3fn), torch.ones(2)
    weight = Fp8Weight(torch.ones(8, 2048).to(torch.float8_e4m3fn), torch.ones(8))
    assert stream_rows(Rows(codes, scale), plain) is None
    assert stream_rows(Rows(codes[:1], scale[:1]), weight) is None
    assert stream_rows(Rows(x[:1]), weight) is None
    blocks = Fp8Weight(torch.ones(128, 2048).to(torch.float8_e4m3fn), torch.ones(1, 16))
    assert stream_rows(Rows(codes, scale), blocks) is None
    large = Fp8Weight(torch.empty(8192, 2048, dtype=torch.float8_e4m3fn), torch.ones(8192))
    assert stream_rows(Rows(torch.ones(5, 2048, dtype=torch.bfloat16)), large) is None


def test_a_cubin_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = variant(4096, BF16, "none", None, False)
    assert found is not None
    defines = {name: int(value) for name, value in found.defines().items()}
    first = program.compiled("stream", defines, "sm_90a")
    assert first[:4] == b"\x7fELF"
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    monkeypatch.setattr(program, "_compile", None)
    assert program.compiled("stream", defines, "sm_90a") == first


def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(DeviceError, match=r"stream\.cu with .*-DK=4096.* does not compile"):
        program.compiled("stream", {"K": 4096}, "sm_90a")


@pytest.mark.parametrize(
    ("capability", "missing", "usable"), [((9, 0), False, True), ((8, 9), False, False), ((9, 0), True, False)]
)
def test_where_it_is_used(
    capability: tuple[int, int], missing: bool, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    def absent(name: str) -> None:
        raise RuntimeError(f"{name} finds no libnvrtc")

    if missing:
        monkeypatch.setattr(program, "import_module", absent)
    registration.usable.cache_clear()
    assert registration.usable() == usable
    registration.usable.cache_clear()
