"""Virtual memory of a GPU: what is asked of the driver, and that nothing is lost when it refuses."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch

from tests.runner.cuda_fake import POISON, FakeCard, FakeCuda
from tests.seeds import SEED
from tokenspeed.contracts.errors import DeviceError, MemoryLimitError, TokenSpeedError, UnsupportedError
from tokenspeed.runner.gpu.driver import Driver, load_driver
from tokenspeed.runner.gpu.memory import CudaArray, VirtualRange, tensor_of

TOTAL = 2**20


def open_range(cuda: FakeCuda, nbytes: int, chunk_bytes: int = 10_000) -> VirtualRange:
    return VirtualRange(Driver(cuda, 3), nbytes, chunk_bytes)


@pytest.mark.parametrize("granularity", [4096, 3 * 4096])
@pytest.mark.parametrize("chunk", [1, 4096, 10_000, TOTAL])
@pytest.mark.parametrize("seed", [SEED])
def test_it_grows_in_chunks_and_shrinks_to_nothing(granularity: int, chunk: int, seed: int) -> None:
    rng, cuda = random.Random(seed), FakeCuda(TOTAL, granularity)
    pages = open_range(cuda, 300_001, chunk)
    address, most = pages.address, -(-300_001 // granularity) * granularity
    assert cuda.ranges == {address: most}
    for _ in range(3):
        asked = 0
        for _ in range(4):
            asked = max(asked, rng.randrange(300_002))
            pages.map(asked)
            assert asked <= pages.mapped < asked + granularity
            assert cuda.touchable(address, pages.mapped)
            assert cuda.free == TOTAL - pages.mapped
        sizes = {size for size, _ in cuda.mappings.values()}
        assert max(sizes, default=0) <= -(-chunk // granularity) * granularity
        pages.unmap()
        assert (pages.mapped, cuda.free, cuda.mappings, pages.address) == (0, TOTAL, {}, address)
    pages.map(300_001)
    pages.close()
    pages.close()
    assert cuda.leaks() == []
    with pytest.raises(RuntimeError, match="range of 0"):
        pages.map(1)


def test_no_more_is_mapped_than_was_reserved() -> None:
    pages = open_range(FakeCuda(TOTAL), 5000)
    with pytest.raises(RuntimeError, match="8193 bytes to map in a range of 8192"):
        pages.map(8193)


def test_nothing_is_unmapped_while_the_device_works() -> None:
    cuda = FakeCuda(TOTAL)
    pages = open_range(cuda, 50_000)
    pages.map(50_000)
    pages.unmap()
    assert cuda.calls.index("wait") == cuda.calls.index("unmap") - 1


def script(cuda: FakeCuda, kept: list[VirtualRange], attempt: Callable[[Callable[[], None]], None]) -> None:
    """A range's whole life; `attempt` runs each part."""
    attempt(lambda: kept.append(open_range(cuda, 40_000)))
    for pages in kept:
        attempt(partial(pages.map, 9000))
        attempt(partial(pages.map, 40_000))
        attempt(pages.unmap)
        attempt(partial(pages.map, 30_000))
        attempt(pages.close)


def calls_of_a_life() -> int:
    cuda = FakeCuda(TOTAL)
    script(cuda, [], lambda part: part())
    assert cuda.leaks() == []
    return len(cuda.calls)


@pytest.mark.parametrize("in_a_row", [1, 2, 3])
def test_whatever_call_fails_nothing_is_lost(in_a_row: int) -> None:
    calls = calls_of_a_life()
    assert calls > 30
    for number in range(1, calls + 1):
        cuda = FakeCuda(TOTAL, fail_at=frozenset(range(number, number + in_a_row)))
        kept: list[VirtualRange] = []
        with pytest.raises(DeviceError, match=r"^cu\w+ .*failed with CUDA_ERROR_UNKNOWN"):
            script(cuda, kept, lambda part: part())
        for pages in kept:
            for _ in range(in_a_row):
                with suppress(DeviceError):
                    pages.close()
        assert cuda.leaks() == [], f"call {number} of {calls}, {cuda.calls[number - 1]}"


@pytest.mark.parametrize("in_a_row", [1, 2, 3])
def test_after_a_failure_the_same_can_be_tried_again(in_a_row: int) -> None:
    def stubborn(part: Callable[[], None]) -> None:
        for _ in range(in_a_row):
            with suppress(DeviceError):
                return part()
        part()

    for number in range(1, calls_of_a_life() + 1):
        cuda = FakeCuda(TOTAL, fail_at=frozenset(range(number, number + in_a_row)))
        kept: list[VirtualRange] = []
        script(cuda, kept, stubborn)
        assert len(kept) == 1
        assert cuda.leaks() == [], f"call {number}, {cuda.calls[number - 1]}"


def test_a_failed_map_changes_nothing() -> None:
    calls = ["attribute", "granularity", "reserve", "create", "map", "allow"]
    for number in range(7, 30):
        cuda = FakeCuda(TOTAL, fail_at=frozenset({number}))
        pages = open_range(cuda, 60_000)
        pages.map(9000)
        assert cuda.calls == calls
        with suppress(DeviceError):
            pages.map(60_000)
        assert pages.mapped in (12_288, 61_440)
        assert (pages.mapped == 61_440) == (len(cuda.calls) < number)
        assert cuda.touchable(pages.address, pages.mapped)


def test_too_little_memory_names_call_bytes_and_limit() -> None:
    cuda = FakeCuda(100 * 4096, others=90 * 4096)
    pages = open_range(cuda, 20 * 4096, 4 * 4096)
    with pytest.raises(MemoryLimitError) as caught:
        pages.map(20 * 4096)
    assert "cuMemCreate of 16384 bytes failed with CUDA_ERROR_OUT_OF_MEMORY" in str(caught.value)
    assert "(8192 of the device's 409600 bytes are free)" in str(caught.value)
    assert "--gpu-memory-utilization" in str(caught.value)
    assert (pages.mapped, cuda.free) == (0, 10 * 4096)
    pages.map(10 * 4096)
    assert cuda.free == 0


def test_a_limit_that_cannot_be_read_hides_no_error() -> None:
    cuda = FakeCuda(TOTAL, fail_at=frozenset({3, 4}))
    with pytest.raises(DeviceError, match=r"^cuMemAddressReserve of 8192 bytes failed with CUDA_ERROR_UNKNOWN$"):
        open_range(cuda, 5000)


def test_devices_and_machines_without_it() -> None:
    with pytest.raises(UnsupportedError, match="device 3 has no virtual memory"):
        Driver(FakeCuda(TOTAL, virtual=False), 3)


def test_the_package_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(UnsupportedError, match="cuda-bindings is not installed"):
        load_driver(0)


@pytest.mark.parametrize("nbytes", [1, 5000, 12_288, 100_001])
def test_memory_sleeps_and_wakes_at_the_same_address(nbytes: int) -> None:
    card = FakeCard(FakeCuda(TOTAL))
    memory = card.pages(nbytes)
    data, at = memory.data, memory.data.data_ptr()
    assert data.shape == (nbytes,)
    data.fill_(7)
    memory.sleep()
    memory.sleep()
    assert card.cuda.free == TOTAL
    memory.wake()
    memory.wake()
    assert card.cuda.touchable(at, nbytes)
    assert memory.data.data_ptr() == at
    assert torch.equal(data, torch.full_like(data, POISON))
    data.fill_(9)  # through the tensor that was made before
    assert int(memory.data.sum()) == 9 * nbytes
    memory.close()
    memory.close()
    assert card.cuda.leaks() == []


def test_who_cannot_wake_goes_on_sleeping() -> None:
    card = FakeCard(FakeCuda(TOTAL))
    memory = card.pages(TOTAL // 2)
    memory.sleep()
    card.cuda.others = TOTAL // 2 + 1
    with pytest.raises(MemoryLimitError, match="cuMemCreate"):
        memory.wake()
    assert card.cuda.free == TOTAL // 2 - 1
    card.cuda.others = 0
    memory.wake()
    assert card.cuda.touchable(memory.data.data_ptr(), TOTAL // 2)


def test_memory_that_cannot_be_made_takes_nothing() -> None:
    clean = FakeCard(FakeCuda(TOTAL))
    kept = clean.pages(50_000)
    for number in range(1, len(clean.cuda.calls) + 1):
        card = FakeCard(FakeCuda(TOTAL, fail_at=frozenset({number})))
        with pytest.raises(TokenSpeedError) as caught:
            card.pages(50_000)
        assert card.cuda.leaks() == [], caught  # which still refers to all that was made
    kept.close()


def test_it_lives_as_long_as_a_tensor_over_it() -> None:
    card = FakeCard(FakeCuda(TOTAL))
    memory = card.pages(50_000)
    view = memory.data[4096:].view(torch.bfloat16).view(-1, 4)
    del memory
    gc.collect()
    assert card.cuda.free == TOTAL - 53_248
    view.fill_(1)
    del view
    gc.collect()
    assert card.cuda.leaks() == []


def test_torch_is_told_where_memory_lies_and_may_not_copy_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = open_range(FakeCuda(TOTAL), 5000)
    told = CudaArray(pages, 5000).__cuda_array_interface__
    assert told == {
        "shape": (5000,),
        "typestr": "|u1",
        "data": (pages.address, False),
        "strides": None,
        "version": 2,
    }

    def copied(array: Any, device: torch.device) -> torch.Tensor:
        return torch.zeros(array.__cuda_array_interface__["shape"], dtype=torch.uint8)

    monkeypatch.setattr(torch, "as_tensor", copied)
    with pytest.raises(DeviceError, match="copied the 5000 bytes"):
        tensor_of(pages, 5000, torch.device("cpu"))


def test_what_torch_is_told_keeps_the_range() -> None:
    cuda = FakeCuda(TOTAL)
    told = CudaArray(open_range(cuda, 5000), 5000)
    gc.collect()
    assert cuda.ranges
    del told
    gc.collect()
    assert cuda.leaks() == []
