"""Attention of prompts by warpgroup products: it compiles for Hopper without spills, is chosen where it applies, and is
given what it expects. What it computes is checked on a GPU (`python -m tokenspeed.bench.gpu.attention --check`)."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.cuda.nvrtc import compile_
from tests.kernels.triton.paged_step import PagedCase, check
from tests.kernels.triton.test_attention_registration import attention_of, program, with_items
from tests.seeds import SEED
from tokenspeed.contracts.errors import DeviceError
from tokenspeed.kernels.cuda import prefill, registration, tensor_maps
from tokenspeed.kernels.cuda.prefill import ROWS, Variant, fits, takes_pages, tensor_map, variant
from tokenspeed.kernels.registry import Registry, Situation
from tokenspeed.kernels.triton import attention_registration, attention_tiles
from tokenspeed.kernels.triton.attention_tiles import PrefillTile, item_tokens, pad, prefill_tile
from tokenspeed.kernels.triton.paged import Heads

BF16 = torch.bfloat16
SIZES = {"b8": 1, "u32": 4, "f32": 4, "u64": 8}


def compiles(found: Variant) -> str:
    log, ptx = compile_("prefill", found.defines(), "sm_90a")
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    assert "serialized" not in log
    assert "setmaxnreg" not in log
    scores = f"wgmma.mma_async.sync.aligned.m64n{prefill.KEYS}k16.f32.bf16.bf16"
    sums = f"wgmma.mma_async.sync.aligned.m64n{found.dim}k16.f32.bf16.bf16"
    first_and_others = 2 * (found.dim // 16), 2 * (prefill.KEYS // 16)
    assert ptx.count("wgmma.mma_async") == sum(first_and_others)
    assert ptx.count(scores) + (ptx.count(sums) if sums != scores else 0) == sum(first_and_others)
    assert ptx.count("griddepcontrol.wait") == 1
    wait = ptx.index("griddepcontrol.wait")
    assert ptx.index("mbarrier.init") < wait < ptx.index("cp.async.bulk.tensor.5d")
    assert wait < ptx.index("ld.global") < ptx.index("st.global")
    for needed in ("mbarrier.try_wait.parity", "mbarrier.arrive.expect_tx", "setmaxnreg.inc", "setmaxnreg.dec"):
        assert needed in ptx
    return ptx


@pytest.mark.parametrize(("heads", "page"), [(Heads(32, 8, 128, 0.1, 0), 16), (Heads(28, 4, 64, 0.1, 0), 64)])
def test_hopper_compiles_it(heads: Heads, page: int) -> None:
    compiles(variant(heads, page))


@pytest.mark.slow
@pytest.mark.parametrize("page", [16, 32, 48, 64, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 16, 64])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_variant_compiles(dim: int, group: int, page: int) -> None:
    compiles(variant(Heads(4 * group, 4, dim, 0.1, 0), page))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 64])
def test_an_item_of_the_work_list_fills_a_tile(dim: int, group: int) -> None:
    assert prefill_tile(dim, 2).rows == ROWS
    found = variant(Heads(2 * group, 2, dim, 0.1, 0), 16)
    assert item_tokens(2 * group, 2, dim, 2) * found.group_pad == ROWS
    assert found.shared <= 227 << 10


def test_what_it_takes() -> None:
    heads = Heads(32, 8, 128, 0.1, 0)
    assert fits(heads)
    assert fits(Heads(128, 2, 64, 0.1, 0))
    for other in (
        heads._replace(window=4096),
        heads._replace(softcap=50.0),
        heads._replace(head_dim=96),
        heads._replace(head_dim=256),
        heads._replace(kv_heads=1, heads=65),
        heads._replace(scale=-0.1),
    ):
        assert not fits(other)


def test_pages_that_it_takes() -> None:
    q, kv = torch.zeros(3, 512, dtype=BF16), torch.zeros(5, 2, 16, 4, 128, dtype=BF16)
    assert takes_pages(q, kv)
    assert takes_pages(torch.zeros(3, 1024, dtype=BF16)[:, 512:], kv)
    assert not takes_pages(q.float(), kv)
    assert not takes_pages(q, kv.to(torch.float8_e4m3fn))
    assert not takes_pages(q, kv[:, :, :8])
    assert not takes_pages(q, torch.zeros(5, 2, 24, 4, 128, dtype=BF16))
    assert not takes_pages(torch.zeros(3, 516, dtype=BF16)[:, 4:], kv)
    assert not takes_pages(torch.zeros(3 * 516, dtype=BF16)[4:].as_strided((3, 512), (512, 1)), kv)
    assert not takes_pages(q, torch.zeros(5, 2, 16, 4, 132, dtype=BF16)[..., :128])
    assert not takes_pages(q, torch.zeros(5, 2, 16, 128, 4, dtype=BF16).transpose(3, 4))
    heads = Heads(4, 4, 128, 0.1, 0)
    case = PagedCase([(5, 70, 0)], heads, 8, SEED, BF16)
    assert prefill.prefill(case.q, case.paged(), torch.zeros(1, 4, dtype=torch.int32), heads) is None


def chosen(heads: Heads, situation: Situation) -> str | None:
    registry, fused = Registry(), program(heads, True)
    attention_registration.register(registry)
    registration.register(registry)
    _, record = attention_of(fused)
    found = registry.choose("attention", fused.operands(record), situation)
    return found.name if found else None


def test_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, situation = Heads(32, 8, 128, 0.1, 0), Situation("cuda", "bfloat16", 65, {})
    monkeypatch.setattr(registration, "usable", lambda: True)
    for hopper in (True, False):
        monkeypatch.setattr(registration, "hopper", lambda hopper=hopper: hopper)
        expected = "cuda.prefill" if hopper else "prefill"
        assert chosen(heads, situation) == expected
        assert chosen(heads, replace(situation, tokens=8192)) == expected
        assert chosen(heads._replace(head_dim=64), situation) == expected
        assert chosen(heads, replace(situation, tokens=64)) == "decode"
        for other in (heads._replace(window=9), heads._replace(softcap=5.0), heads._replace(head_dim=80)):
            assert chosen(other, situation) == "prefill"
        assert chosen(heads, replace(situation, dtype="float16")) == "prefill"
        assert chosen(heads, replace(situation, device="cpu")) is None
        assert chosen(heads, replace(situation, batch_invariant=True)) is None


def test_sinks_are_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "usable", lambda: True)
    monkeypatch.setattr(registration, "hopper", lambda: True)
    fused = program(Heads(32, 8, 128, 0.1, 0), True)
    _, record = attention_of(fused)
    operands, registry = fused.operands(record), Registry()
    registration.register(registry)
    situation = Situation("cuda", "bfloat16", 128, {})
    assert registry.choose("attention", operands, situation) is not None
    assert registry.choose("attention", replace(operands, weights=("sinks",)), situation) is None


@pytest.mark.parametrize(("capability", "there"), [((9, 0), True), ((8, 9), False), ((10, 0), False), ((12, 0), False)])
def test_only_hopper_has_its_products(
    capability: tuple[int, int], there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for compiler in (True, False):
        monkeypatch.setattr(registration, "compiler_found", lambda compiler=compiler: compiler)
        for known in (registration.usable, registration.hopper):
            known.cache_clear()
        assert registration.hopper() == (there and compiler)
    for known in (registration.usable, registration.hopper):
        known.cache_clear()


class Launches:
    """A kernel and a driver that note what they are given; `status` is the driver's answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
        self.launched: list[tuple[tuple[int, int, int], list[tuple[Any, Any]]]] = []
        self.maps: list[tuple[Any, ...]] = []
        self.status = status
        monkeypatch.setattr(prefill, "kernel", lambda found, device: self)
        monkeypatch.setattr(prefill, "processors", lambda device: 132)
        monkeypatch.setattr(tensor_maps, "encoder", lambda: self.encode)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        tensor_map.cache_clear()

    def launch(self, grid: tuple[int, int, int], arguments: list[tuple[Any, Any]]) -> None:
        self.launched.append((grid, arguments))

    def encode(self, *arguments: Any) -> int:
        self.maps.append(arguments)
        return self.status


def parameters(ptx: str) -> list[int]:
    """Bytes of a kernel's parameters."""
    found = re.findall(r"\.param (?:\.align \d+ )?\.(\w+) prefill_param_\d+(?:\[(\d+)\])?[,\n]", ptx)
    return [SIZES[kind] * int(count or 1) for kind, count in found]


@pytest.mark.parametrize("seed", [SEED])
def test_arguments_are_those_of_the_kernel(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    heads = Heads(12, 4, 64, 0.2, 0)
    case = with_items(PagedCase([(5, 70, 0), (60, 3, 2)], heads, 16, seed, BF16))
    seen, paged, items = Launches(monkeypatch), case.paged(), case.step.items
    assert items is not None
    wide = torch.zeros(75, 12 * 64 + 8, dtype=BF16)
    wide[:, : 12 * 64] = case.q
    out = prefill.prefill(wide[:, : 12 * 64], paged, items, heads)
    assert out is not None
    assert out.shape == case.q.shape
    assert out.is_contiguous()
    ((grid, arguments),) = seen.launched
    assert grid == (min(132, 4 * len(items)), 1, 1)
    _, ptx = compile_("prefill", variant(heads, 16).defines(), "sm_90a")
    types = [type(value) if kind is None else kind for value, kind in arguments]
    assert [ctypes.sizeof(kind) for kind in types] == parameters(ptx)
    assert [value for value, _ in arguments[1:]] == [
        wide.data_ptr(), paged.table.data_ptr(), items.data_ptr(), out.data_ptr(), 12 * 64 + 8, paged.table.stride(0),
        len(items), 4, len(paged.kv), pytest.approx(0.2 * 1.4426950408889634),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("page", [16, 48, 256])
def test_a_map_finds_every_entry(monkeypatch: pytest.MonkeyPatch, seed: int, page: int) -> None:
    case = PagedCase([(0, 7, 0)], Heads(6, 3, 128, 0.1, 0), page, seed, BF16)
    seen, kv = Launches(monkeypatch), case.paged().kv
    kv.copy_(case.random(*kv.shape))
    box = variant(case.heads, page).box
    assert page % box == 0
    assert prefill.KEYS % box == 0
    tensor_map(kv.data_ptr(), tuple(kv.shape), kv.stride(), box)
    tensor_map(kv.data_ptr(), tuple(kv.shape), kv.stride(), box)
    ((at, kind, rank, address, sizes, strides, boxes, steps, *modes),) = seen.maps
    assert ctypes.addressof(at._obj) % 64 == 0
    assert (kind, rank, modes) == (9, 5, [0, 3, 3, 0])
    assert (list(boxes), list(steps)) == ([64, box, 1, 1, 1], [1] * 5)
    assert address.value == kv.data_ptr()
    apart = [1, *(stride // 2 for stride in strides)]
    found = kv.as_strided(list(sizes)[::-1], apart[::-1])
    assert torch.equal(found.transpose(2, 3), kv)


def test_what_the_driver_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Launches(monkeypatch, status=1)
    with pytest.raises(DeviceError, match=r"no tensor map for pages \[2, 2, 16, 1, 64\] .*: error 1"):
        tensor_map(0, (2, 2, 16, 1, 64), (2048, 1024, 64, 64, 1), 16)


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("normed", [False, True])
def test_steps_beyond_it_go_the_triton_way(monkeypatch: pytest.MonkeyPatch, seed: int, normed: bool) -> None:
    """Float32 queries, which the kernel refuses, and attention with a window, which does not get there."""
    monkeypatch.setattr(registration, "hopper", lambda: True)
    monkeypatch.setitem(attention_tiles.PREFILL, (64, 4), PrefillTile(64, 32, 4, 1))
    for sequences in attention_tiles.DECODE:
        monkeypatch.setitem(attention_tiles.DECODE, sequences, attention_tiles.DecodeTile(1, 16, 1, 4, 2))
    heads = Heads(2, 1, 16, 0.25, 9 if normed else 0)
    case = with_items(PagedCase([(5, 67, 0), (40, 1, 0)], heads, 16, seed))
    _, attention = attention_of(program(heads, False))
    (found,) = registration.run_prefill(case.step, attention, [case.q], [])
    check(found, case.answer(), torch.float32)


def test_items_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Launches(monkeypatch)
    heads = Heads(4, 2, 64, 0.25, 0)
    case = with_items(PagedCase([(5, 70, 0)], heads, 16, SEED, BF16))
    view = replace(case.step, decode_rows=None)
    _, attention = attention_of(program(heads, False))
    monkeypatch.setattr(registration, "hopper", lambda: True)
    (out,) = registration.run_prefill(view, attention, [case.q], [])
    assert len(seen.launched) == 1
    assert out.shape == case.q.shape
    sinks = [torch.zeros(4)]
    monkeypatch.setattr(registration, "by_tiles", lambda *given: given[-1])
    assert registration.run_prefill(view, attention, [case.q], sinks)[0] is sinks[0]
    monkeypatch.setattr(registration, "hopper", lambda: False)
    assert registration.run_prefill(view, attention, [case.q], [])[0] is None
    assert len(seen.launched) == 1
    assert pad(heads.group) == 2
