"""One tiny model for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.seeds import SEED
from tests.tiny_llama import write_tiny
from tokenspeed.engine.llm import LLM


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random model."""
    print(f"seed {SEED}")
    return write_tiny(tmp_path_factory.mktemp("tiny"), SEED)


@pytest.fixture(scope="session")
def loaded_tiny(tiny_path: Path) -> LLM:
    return LLM(str(tiny_path), dtype="float32", max_num_batched_tokens=16, block_size=4)


@pytest.fixture
def llm(loaded_tiny: LLM) -> Iterator[LLM]:
    """The tiny model with an empty prefix cache; afterwards no page may be held."""
    loaded_tiny.core.cache.reset()
    yield loaded_tiny
    assert not loaded_tiny.core.has_work
    loaded_tiny.core.cache.check_idle()
