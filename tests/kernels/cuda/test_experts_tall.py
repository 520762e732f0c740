"""The kernels of experts by Hopper's products compile without spills, wait where they must and convert no weights; what
they take. What they compute is checked on a GPU: `python -m tokenspeed.bench.gpu.experts --check`."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cuda.nvrtc import compile_
from tests.seeds import SEED
from tokenspeed.bench.gpu.expert_cases import ExpertCase
from tokenspeed.kernels.cuda.experts_tall import ALL_SHARED, MOST_TOKENS, Variant, multiply_experts, variant
from tokenspeed.kernels.cuda.stream_tiles import FORMATS
from tokenspeed.quantization.fp8 import Fp8Weight

SHAPES = [(8, 2048, 768), (8, 4096, 1408), (8, 3072, 1536)]
"""Choices of a token, hidden and inner columns: Qwen3-30B-A3B, GLM-4.5-Air, MiniMax M2."""
TYPES = {"bf16": torch.Tensor, "fp8": Fp8Weight}
PRODUCT = {"bf16": "m64n{}k16.f32.bf16.bf16", "fp8": "m64n{}k32.f32.e4m3.e4m3"}


def both(tokens: int, shape: tuple[int, int, int], fmt: str, act: str = "silu") -> list[Variant]:
    (choices, hidden, ff), number = shape, FORMATS[TYPES[fmt]]
    given = (
        variant(tokens, 128, choices, hidden, ff, number, act),
        variant(tokens, 128, choices, ff, hidden, number, "none"),
    )
    return [each for each in given if each is not None]


def check(found: Variant, fmt: str) -> None:
    log, ptx = compile_("experts_tall", found.defines(), "sm_90a")
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    wait, start, copy = (
        ptx.index(each) for each in ("griddepcontrol.wait", "griddepcontrol.launch", "cp.async.bulk.tensor.5d")
    )
    # Down has its weights on their way before it waits; gate and up lets it start only once the router has ended.
    assert start < copy < wait if found.down else wait < start < copy
    # Of a stage four products for each line of 128 bytes, of weights as they are in memory.
    assert ptx.count(f"wgmma.mma_async.sync.aligned.{PRODUCT[fmt].format(found.rows)}") == 4 * found.step
    assert "cvt.rn.f16x2.e4m3x2" not in ptx
    assert found.shared <= ALL_SHARED // found.programs - 1024


@pytest.mark.parametrize(("fmt", "tokens"), [("bf16", 2), ("fp8", 8)])
def test_qwen(fmt: str, tokens: int) -> None:
    found = both(tokens, SHAPES[0], fmt)
    assert [each.down for each in found] == [False, True]
    for each in found:
        check(each, fmt)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("fmt", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 33])
def test_every_variant(tokens: int, shape: tuple[int, int, int], fmt: str, act: str) -> None:
    found = both(tokens, shape, fmt, act)
    assert len(found) == 2 or fmt == "bf16"  # of which not every shape has room for its rows
    for each in found:
        check(each, fmt)


def test_what_is_not_taken() -> None:
    bf16 = FORMATS[torch.Tensor]
    assert variant(8, 128, 8, 2048, 768, bf16, "silu") is not None
    assert variant(MOST_TOKENS + 1, 128, 8, 2048, 768, bf16, "silu") is None
    assert variant(8, 128, 8, 2048, 768, bf16, "swiglu_clamped") is None
    assert variant(8, 128, 8, 2048 + 32, 768, bf16, "silu") is None
    assert variant(8, 128, 8, 2048, 768 + 16, bf16, "silu") is None
    assert variant(8, 128, 8, 14336, 4096, bf16, "none") is None  # x does not fit beside the ring
    g = torch.Generator().manual_seed(SEED)
    for case in (ExpertCase(4, 2, 256, 128, fmt="block"), ExpertCase(4, 2, 256, 128, biased=True)):
        assert multiply_experts(*case.choices(3, g), case.random(g)) is None
