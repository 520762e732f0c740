"""A decode step's rope, KV write and attention in one kernel: against the pair of kernels, and against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from tests.kernels.triton.paged_step import PagedCase, check
from tests.kernels.triton.test_rope_write import expected_heads
from tests.seeds import SEED
from tokenspeed.kernels.triton import rope_attention as rope_attention_module
from tokenspeed.kernels.triton import splits
from tokenspeed.kernels.triton.attention_tiles import DecodeTile, FusedTile
from tokenspeed.kernels.triton.decode_attention import decode_attention
from tokenspeed.kernels.triton.paged import Heads
from tokenspeed.kernels.triton.rope_attention import rope_attention
from tokenspeed.kernels.triton.rope_write import HeadNorm, rope_write
from tokenspeed.ops.rope import Rope

F8 = torch.float8_e4m3fn
PADDING = (0, 0, 1)


def tile(most: int, keys: int = 16, min_blocks: int = 1, **more: Any) -> FusedTile:
    return FusedTile(most, keys, min_blocks, 4, 2, **more)


class Step:
    """A `PagedCase` of rows that feed one token, before its keys are written, with what a projection would give."""

    def __init__(self, case: PagedCase, rope: Rope, normed: bool = False) -> None:
        self.case, self.rope, self.heads = case, rope, case.heads
        size, dim = self.heads.kv_heads * self.heads.head_dim, self.heads.head_dim
        qkv = (case.random(len(case.step.positions), (self.heads.group + 2) * size) * 1.5).to(case.dtype)
        self.q, self.k, self.v = qkv.split([self.heads.group * size, size, size], dim=-1)
        norms = [HeadNorm(1 + 0.3 * case.random(dim), eps) for eps in (1e-6, 1e-2)]
        self.norms = (norms[0], norms[1]) if normed else None
        keys = self._turned(self.k, 1)
        at = case.step.positions.tolist(), case.step.slots.tolist()
        for position, slot, key, value in zip(*at, keys, self.v.reshape(keys.shape), strict=True):
            if slot >= 0:
                self.entry(position, slot).fill_(float("nan"))
                case.keys[slot][:, position] = torch.stack((key.to(case.dtype), value)).to(case.kv_dtype or case.dtype)
        case.q = self._turned(self.q, 0).flatten(1).to(case.dtype)

    def entry(self, position: int, slot: int) -> torch.Tensor:
        paged, size = self.case.paged(), self.case.page_size
        return paged.kv[int(paged.table[slot, position // size]), :, position % size]

    def _turned(self, x: torch.Tensor, which: int) -> torch.Tensor:
        at, dim = self.case.step.positions, self.heads.head_dim
        return expected_heads(x.reshape(len(at), -1, dim), at, self.rope, self.norms and self.norms[which])

    def fused(self, used: FusedTile, sinks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Output, and the pages afterwards; the case keeps its own."""
        paged = self.case.paged()
        paged = paged._replace(kv=paged.kv.clone())
        out = rope_attention(self.q, self.k, self.v, paged, self.rope, self.heads, used, self.norms, sinks)
        return out, paged.kv

    def apart(self, used: DecodeTile, sinks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by two kernels."""
        paged = self.case.paged()
        paged = paged._replace(kv=paged.kv.clone())
        q = rope_write(self.q, self.k, self.v, paged, self.rope, self.norms)
        return decode_attention(q, paged, self.heads, used, sinks), paged.kv


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


CASES = {
    "gqa": (Heads(8, 2, 64, 0.125, 0), 16, Rope(5e5, 64), False, torch.float32, None, tile(3, 32)),
    "norms, sinks": (Heads(4, 1, 128, 0.09, 0), 64, Rope(1e6, 128), True, torch.float32, None, tile(5)),
    "f16, norms, part of a head": (Heads(4, 2, 64, 0.1, 0), 32, Rope(1e4, 32), True, torch.float16, None, tile(4)),
    "odd head, window, group of 1": (Heads(2, 2, 80, 0.11, 37), 16, Rope(1e4, 80), False, torch.float32, None, tile(2)),
    "group of 7, window of 1, sinks": (Heads(7, 1, 64, 0.1, 1), 16, Rope(1e4, 64), False, torch.float32, None, tile(2)),
    "fp8 pages": (Heads(7, 1, 64, 0.125, 0), 16, Rope(1e4, 64), False, torch.float16, F8, tile(4)),
    "wide, window, no split": (Heads(2, 1, 256, 0.06, 33), 64, Rope(1e6, 256), True, torch.float32, None, tile(1)),
    "fitted, sinks": (
        Heads(4, 2, 64, 0.1, 0),
        16,
        Rope(1e4, 64),
        False,
        torch.float32,
        None,
        tile(4, 32, 2, programs=11),
    ),
    "nothing held": (Heads(4, 2, 64, 0.1, 50), 64, Rope(1e4, 64), False, torch.float32, None, tile(3, held=False)),
}


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("name", CASES)
def test_one_kernel_does_what_two_do(seed, name):
    heads, page, rope, normed, dtype, kv_dtype, used = CASES[name]
    far = torch.randint(1, 140, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [(0, 1, 0), (far[0], 1, 0), PADDING, (far[1], 1, 0), (far[2], 1, 1), (16, 1, 0)]
    step = Step(PagedCase(rows, heads, page, seed, dtype, kv_dtype), rope, normed)
    sinks = step.case.random(heads.heads) * 2 if "sinks" in name else None
    out, pages = step.fused(used, sinks)
    expected, written = step.apart(DecodeTile(*used[:5]), sinks)
    check(out, expected.double(), dtype)
    assert same_bytes(pages, written)
    assert (out[step.case.step.slots < 0] == 0).all()
    if kv_dtype is None:  # torch and the interpreter round some values to e4m3 differently
        check(out, step.case.answer(sinks), dtype)
    assert (splits.arrivals(torch.device("cpu"), 1024) == 0).all()


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("programs", [0, 7], ids=["fixed", "fitted"])
def test_whoever_finishes_last_gives_the_same_bits(monkeypatch, seed, programs):
    """Programs run in another order: every split is once the last of its item."""
    heads, used = Heads(4, 2, 64, 0.1, 0), tile(4, programs=programs)
    step = Step(PagedCase([(57, 1, 0), (seed % 60, 1, 1)], heads, 16, seed), Rope(1e4, 64))
    expected, pages = step.fused(used)
    set_place = InterpreterBuilder.set_grid_idx
    for turn in range(1, used.splits):
        monkeypatch.setattr(
            InterpreterBuilder,
            "set_grid_idx",
            lambda self, x, y, z, turn=turn: set_place(self, x, (y + turn) % used.splits, z),
        )
        out, written = step.fused(used)
        assert torch.equal(out, expected)
        assert same_bytes(written, pages)


@pytest.mark.parametrize("seed", [SEED])
def test_a_row_has_the_same_bits_alone_where_splits_are_fixed(seed):
    step = Step(PagedCase([(90, 1, 0), (17, 1, 0), (41, 1, 0)], Heads(4, 2, 64, 0.1, 0), 16, seed), Rope(1e4, 64))
    together, _ = step.fused(tile(3))
    paged = step.case.paged()
    paged = paged._replace(positions=paged.positions[2:], slots=paged.slots[2:])
    alone = rope_attention(step.q[2:], step.k[2:], step.v[2:], paged, step.rope, step.heads, tile(3))
    assert torch.equal(alone, together[2:])


@triton.jit
def _fit(positions, slots, out, window, num_tokens, most, few, KEYS: tl.constexpr, TOKENS_PAD: tl.constexpr):
    tl.store(out, rope_attention_module._fitting(positions, slots, window, num_tokens, most, few, KEYS, TOKENS_PAD))


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("rows, window", [(1, 0), (8, 0), (32, 700), (61, 0)])
def test_splits_fill_the_device_and_no_more(seed, rows, window):
    """132 processors with 3 programs each, 8 key heads, blocks of 64 keys."""
    most, few, keys, out = 396 // 8, 5, 64, torch.zeros(1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    for longest in (200, 1100, 40000):
        positions = torch.randint(0, longest, (rows + 2,), generator=generator, dtype=torch.int32)
        slots = torch.arange(rows + 2, dtype=torch.int32)
        slots[rows // 2] = slots[-1] = -1
        _fit[(1,)](positions, slots, out, window, rows + 2, most, few, KEYS=keys, TOKENS_PAD=64)
        first = (positions - window + 1).clamp(min=0) if window else torch.zeros_like(positions)
        blocks = torch.where(positions > first, (positions + keys - 1) // keys - first // keys, 0)
        blocks = blocks.clamp(min=1)[slots >= 0]
        each = int(out)
        used = int(((blocks + each - 1) // each).sum())
        if rows > most:
            assert each == max(few, -(-int(blocks.sum()) // most))
            continue
        assert used <= most
        # Splits three quarters as long would not fit, or are those of one block.
        shorter = each * 3 // 4
        assert each == 1 or int(((blocks + shorter - 1) // shorter).sum()) > most
