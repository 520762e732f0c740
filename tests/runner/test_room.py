"""What of a machine's or a GPU's memory the KV cache gets, and what the largest step is."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.seeds import SEED
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ConfigError, MemoryLimitError
from tokenspeed.models.registry import define_from_hf, shipped_configs
from tokenspeed.runner import model
from tokenspeed.runner.gpu.largest_step import StepLimits, later_bytes
from tokenspeed.runner.room import MARGIN_BYTES, CardUse, share_of_card, share_of_free

GB = 10**9


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(**settings)


def test_a_share_of_free_memory() -> None:
    assert share_of_free(1000, config()).cache_bytes == 250
    assert share_of_free(1000, config(kv_cache_memory_bytes=1000)).cache_bytes == 1000
    with pytest.raises(MemoryLimitError, match="--kv-cache-memory-bytes 1001 is more than the 1000 that are free"):
        share_of_free(1000, config(kv_cache_memory_bytes=1001))


def test_a_model_that_cannot_be_made_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were made")

    monkeypatch.setattr(model, "dummy_weights", made)
    definition = define_from_hf(shipped_configs()["qwen3-30b-a3b"], None)
    monkeypatch.setattr(model, "free_memory", lambda device: 60 * GB)
    with pytest.raises(MemoryLimitError, match=r"weights take 61\d{9} bytes, and 60000000000 are free on cpu"):
        model.load_model(definition, None, config(device="cpu"))
    with pytest.raises(ConfigError, match="--quantization fp8 runs on GPUs only"):
        model.load_model(definition, None, config(device="cpu", quantization="fp8"))


@pytest.mark.parametrize(
    "use, utilization, expected",
    [
        # weights and steps took 20: they count against the share
        (CardUse(141 * GB, 140 * GB, 120 * GB), 0.9, int(0.9 * 141 * GB) - 20 * GB),
        (CardUse(141 * GB, 140 * GB, 120 * GB), 0.5, int(0.5 * 141 * GB) - 20 * GB),
        (CardUse(141 * GB, 140 * GB, 120 * GB, 3 * GB), 0.5, int(0.5 * 141 * GB) - 23 * GB),
        # others took 100 before: not the share but what is free is the limit, less the margin
        (CardUse(141 * GB, 41 * GB, 21 * GB), 0.9, 21 * GB - MARGIN_BYTES),
        (CardUse(141 * GB, 41 * GB, 21 * GB, GB), 0.9, 20 * GB - MARGIN_BYTES),
        (CardUse(141 * GB, 140 * GB, 120 * GB), 1.0, 120 * GB - MARGIN_BYTES),
        # others ended meanwhile
        (CardUse(141 * GB, 40 * GB, 130 * GB), 0.9, int(0.9 * 141 * GB)),
    ],
)
def test_a_share_of_a_card(use: CardUse, utilization: float, expected: int) -> None:
    room = share_of_card(use, config(gpu_memory_utilization=utilization))
    assert (room.cache_bytes, room.free_bytes, room.flag) == (expected, use.free, "--gpu-memory-utilization")


@pytest.mark.parametrize("seed", [SEED])
def test_it_never_takes_what_is_not_there(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        total = rng.randrange(GB, 200 * GB)
        use = CardUse(total, rng.randrange(total), rng.randrange(total), rng.randrange(GB))
        share = rng.uniform(0.01, 1)
        try:
            room = share_of_card(use, config(gpu_memory_utilization=share))
        except MemoryLimitError as error:
            assert "--gpu-memory-utilization" in str(error)  # noqa: PT017
            continue
        assert 0 < room.cache_bytes <= use.free - use.later - MARGIN_BYTES
        assert room.cache_bytes + use.free_at_start - use.free <= share * total or use.free > use.free_at_start


def test_what_was_asked_for_may_be_all_but_the_margin() -> None:
    use = CardUse(141 * GB, 140 * GB, 10 * GB)
    most = 10 * GB - MARGIN_BYTES
    assert share_of_card(use, config(kv_cache_memory_bytes=most)).cache_bytes == most
    with pytest.raises(MemoryLimitError, match=f"{most + 1} is more than {most}: {10 * GB} bytes are free"):
        share_of_card(use, config(kv_cache_memory_bytes=most + 1))


def test_nothing_left_names_every_number() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        share_of_card(CardUse(16 * 2**30, 16 * 2**30, 2**30, 2**20), config())
    for number in ("taken 15360.0 MiB", "needs 1.0 more", "share of 14745.6", "0.9 of 16384.0", "1024.0 are free"):
        assert number in str(caught.value)
    assert "513.0 stay so" in str(caught.value)
    with pytest.raises(MemoryLimitError, match=r"share of 4096\.0 "):
        share_of_card(CardUse(16 * 2**30, 15 * 2**30, 2**30), config(gpu_memory_utilization=0.25))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_is_a_part(share: float) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory-utilization must be above 0 and at most 1"):
        config(gpu_memory_utilization=share)


@pytest.mark.parametrize(
    "limits, counts",
    [
        (StepLimits(4, 19, 100), [5, 5, 5, 4]),
        (StepLimits(64, 512, 4096), [8] * 64),
        (StepLimits(64, 7, 4096), [1] * 7),
        (StepLimits(2, 512, 11), [10, 10]),
        (StepLimits(1, 1, 2), [1]),
    ],
)
def test_rows_of_the_largest_step(limits: StepLimits, counts: list[int]) -> None:
    assert limits.counts() == counts
    assert max(counts) < limits.length


def test_bytes_of_later_graphs() -> None:
    rows = (1 + 2 + 4 + 5 * 4) + (1 + 2 + 4 + 5)  # buckets to 64 mixed, to 8 decoding
    assert later_bytes(StepLimits(5, 33, 100), 1000, 2) == (rows * 2 + 4 * 5) * 1000
