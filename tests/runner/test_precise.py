"""Which types the settings lead to, on the backend that is fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity_tools import CASES, make_gguf
from tokenspeed.config.engine import EngineConfig
from tokenspeed.runner.build import open_model, prepare


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(CASES["llama"], "Q8_0", tmp_path_factory.mktemp("tiny") / "model.gguf").path


@pytest.mark.parametrize(
    "settings, backend, kv",
    [
        ({}, "cpu", torch.bfloat16),
        ({"kv_cache_dtype": "float32"}, "cpu", torch.float32),
        ({"precise": True}, "cpu", torch.float32),
        ({"precise": True, "kv_cache_dtype": "float32"}, "cpu", torch.float32),
        ({"precise": True, "kv_cache_dtype": "bfloat16"}, "cpu", torch.bfloat16),
        ({"precise": True, "dtype": "float32"}, "ref", torch.float32),
    ],
)
def test_types(tiny_file: Path, settings: dict[str, Any], backend: str, kv: torch.dtype) -> None:
    config = EngineConfig(model=str(tiny_file), device="cpu", **settings)
    prepared = prepare(open_model(config), config)
    assert prepared.backend.name == backend
    assert prepared.shape.dtype == kv
    assert prepared.model.dtype == (torch.float32 if "precise" in settings else torch.bfloat16)
