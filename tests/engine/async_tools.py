"""Starting engines of `fake_core`, and waiting."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.sampling import RequestOutputKind, SamplingParams
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.engine.stream import RequestStream

ROOT = Path(__file__).parents[2]
LIMIT_S = 30.0
"""No test takes this long, unless something hangs."""
T = TypeVar("T")


def command(mode: str, step_s: float = 0.0) -> list[str]:
    """The command of a fake engine process; with mode "null", of one that has a real scheduler."""
    if mode == "null":
        return [sys.executable, "-m", "tests.engine.null_core"]
    return [sys.executable, "-m", "tests.engine.fake_core", mode, str(step_s)]


def run(main: Awaitable[T]) -> T:
    """Run a coroutine, but not for ever."""

    async def bounded() -> T:
        return await asyncio.wait_for(main, LIMIT_S)

    return asyncio.run(bounded())


@asynccontextmanager
async def fake_engine(
    mode: str = "ok", step_s: float = 0.0, config: EngineConfig | None = None, **settings: Any
) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(config or EngineConfig(), core_command=command(mode, step_s), **settings)
    try:
        yield engine
    finally:
        await engine.close()


def deltas(max_tokens: int = 20, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA, **fields)


async def read(stream: RequestStream, index: int = 0) -> list[int]:
    """Token ids of one sample, to the end."""
    outputs = [completion async for output in stream for completion in output.outputs]
    return [token for completion in outputs if completion.index == index for token in completion.token_ids]


async def until(true: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    while not true():
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process of ours exists, as more than a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def write_byte_tokenizer(folder: Path) -> Path:
    """A tokenizer.json with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: at + 20 for at, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine processes find this tree, wherever the tests were started."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
