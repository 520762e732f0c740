"""Settings that contradict each other, and paths given as such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ConfigError


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dtype": "bfloat16"}, "--precise contradicts --dtype bfloat16: it goes with auto or float32"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"kv_cache_dtype": "float16"}, "--precise contradicts --kv-cache-dtype float16.*float32 or bfloat16"),
    ],
)
def test_what_precise_contradicts(settings: dict[str, Any], message: str) -> None:
    EngineConfig(**settings)
    with pytest.raises(ConfigError, match=message):
        EngineConfig(precise=True, **settings)


@pytest.mark.parametrize("kv", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_what_precise_goes_with(dtype: str, kv: str) -> None:
    assert EngineConfig(precise=True, dtype=dtype, kv_cache_dtype=kv).precise


def test_paths_become_text(tmp_path: Path) -> None:
    config = EngineConfig.from_kwargs({"model": tmp_path / "m.gguf", "packed_cache": tmp_path})
    assert (config.model, config.packed_cache) == (str(tmp_path / "m.gguf"), str(tmp_path))
    assert EngineConfig().packed_cache is None


@pytest.mark.parametrize("value", [1, "yes", None])
def test_precise_is_yes_or_no(value: Any) -> None:
    with pytest.raises(ConfigError, match="--precise must be bool"):
        EngineConfig(precise=value)


def test_code_of_a_repository_is_never_run() -> None:
    with pytest.raises(ConfigError, match="--trust-remote-code is refused"):
        EngineConfig.from_kwargs({"trust_remote_code": True})
    assert EngineConfig.from_kwargs({"trust_remote_code": False}) == EngineConfig()


@pytest.mark.parametrize("value", [0, -0.5, 1.5, float("nan"), float("inf")])
def test_shares_lie_between_0_and_1(value: float) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory-utilization must be above 0 and at most 1"):
        EngineConfig(gpu_memory_utilization=value)
    assert EngineConfig(gpu_memory_utilization=1).gpu_memory_utilization == 1


@pytest.mark.parametrize(("asked", "cpu", "cuda"), [(None, 512, 2048), (7, 7, 7)])
def test_tokens_of_a_step(asked: int | None, cpu: int, cuda: int) -> None:
    config = EngineConfig(max_num_batched_tokens=asked)
    assert (config.step_tokens("cpu"), config.step_tokens("cuda")) == (cpu, cuda)
