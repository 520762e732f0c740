"""Fixtures of the whole suite. Nothing here imports torch until a test asks for a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tokenspeed.engine.llm import LLM

# Read by torch when it is first imported: workers of one run must not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# Read by triton when it is first imported, by whichever test does so: kernels run in its interpreter here.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo model's .gguf file."""
    from tokenspeed.config.demo import demo_model_path

    return demo_model_path()


@pytest.fixture(scope="session")
def loaded_demo(demo_path: Path) -> Iterator[LLM]:
    """The demo model in float32, made once per worker. Tests take `demo_llm`, which checks what they leave behind."""
    from tokenspeed.engine.llm import LLM

    llm = LLM(str(demo_path), dtype="float32", max_model_len=2048, seed=0)
    yield llm
    llm.close()


@pytest.fixture
def demo_llm(loaded_demo: LLM) -> Iterator[LLM]:
    """The demo model in float32, with an empty prefix cache; afterwards no page may be held."""
    loaded_demo.core.cache.reset()
    yield loaded_demo
    assert not loaded_demo.core.has_work
    loaded_demo.core.cache.check_idle()
