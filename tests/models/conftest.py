"""Tiny checkpoints, each made once per run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity_tools import CASES, Tiny, make_gguf, make_safetensors

TinyMaker = Callable[[str, str], Tiny]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyMaker:
    """tiny(case name, format): "F32", "BF16", "F16" and "F32-sharded" as safetensors, "gguf-..." as GGUF."""
    made: dict[tuple[str, str], Tiny] = {}

    def make(name: str, fmt: str) -> Tiny:
        if (name, fmt) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{fmt}")
            if fmt == "gguf-K":
                made[name, fmt] = make_gguf(CASES[name].with_k_widths(), "K", folder / "model.gguf")
            elif fmt.startswith("gguf-"):
                made[name, fmt] = make_gguf(CASES[name], fmt.removeprefix("gguf-"), folder / "model.gguf")
            else:
                shard_size = "60KB" if fmt.endswith("-sharded") else "1GB"
                made[name, fmt] = make_safetensors(CASES[name], fmt.split("-")[0], folder, shard_size)
        return made[name, fmt]

    return make
