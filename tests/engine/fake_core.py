"""An engine process without a model: `python -m tests.engine.fake_core MODE [STEP_SECONDS]`.

It says its prompt again and again; sample i begins at token i. MODE makes it fail in one way or another.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import EngineBusyError, MemoryLimitError, ModelNotFoundError, UnsupportedError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.engine.loop import Progress, run
from tokenspeed.engine.messages import EngineInfo
from tokenspeed.engine.trace import StepTrace
from tokenspeed.observability.metrics import STEP_BOUNDS, Histogram

VOCAB_SIZE = 300
MAX_MODEL_LEN = 4096
REFUSED = 13
"""A prompt that begins with this id is refused by the engine itself."""
FATAL = 14
"""A prompt that begins with this id makes the next step raise, hang, do nothing, or end the process."""


def said(prompt: list[int], index: int, count: int) -> list[int]:
    """What a sample gives in `count` tokens."""
    return [prompt[(index + at) % len(prompt)] for at in range(count)]


class FakeCore:
    """Implements `loop.Core`: one token per step for every sequence."""

    def __init__(self, mode: str, step_s: float) -> None:
        self.mode, self.step_s = mode, step_s
        self.running: dict[tuple[str, int], tuple[Request, int]] = {}
        self.counts = {"aborts": 0, "steps": 0, "added": 0}
        self.trace: StepTrace | None = None
        self.started: list[tuple[str, float]] = []
        self.step_times = Histogram(STEP_BOUNDS)

    def add(self, request: Request) -> None:
        if request.prompt_token_ids[0] == REFUSED:
            raise MemoryLimitError("13 brings bad luck, at most 12 are allowed")
        self.counts["added"] += 1
        for index in range(request.params.n):
            self.running[request.request_id, index] = (request, 0)

    def abort(self, request_id: str, index: int | None = None) -> None:
        for key in list(self.running):
            if key[0] == request_id and index in (None, key[1]):
                del self.running[key]
                self.counts["aborts"] += 1

    def step(self) -> list[SequenceUpdate]:
        time.sleep(self.step_s)
        if any(request.prompt_token_ids[0] == FATAL for request, _ in self.running.values()):
            if self.mode == "livelock":
                return []
            self._go_wrong()
        self.counts["steps"] += 1
        return [self._advance(key) for key in list(self.running)]

    def _advance(self, key: tuple[str, int]) -> SequenceUpdate:
        request, done = self.running[key]
        token = said(request.prompt_token_ids, key[1], done + 1)[-1]
        ended = done + 1 == request.params.max_tokens
        self.running[key] = (request, done + 1)
        if ended:
            del self.running[key]
        return SequenceUpdate(
            request_id=key[0], index=key[1], new_token_ids=[token], finish_reason="length" if ended else None
        )

    def _go_wrong(self) -> None:
        if self.mode == "hang":
            time.sleep(600)
        if self.mode == "exit":
            os._exit(7)
        raise RuntimeError("the bolt broke")

    @property
    def num_steps(self) -> int:
        return self.counts["steps"]

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def stats(self) -> Mapping[str, float]:
        return self.counts | {"running": len(self.running)}

    asleep = False

    def sleep(self, level: int = 1) -> None:
        assert not self.running
        if self.mode == "no-sleep":
            raise UnsupportedError("no bed for the KV cache")
        time.sleep(self.step_s)
        self.asleep = True

    def wake(self) -> None:
        if self.mode == "no-wake":
            raise MemoryLimitError("somebody else has the memory, 0 bytes are free")
        if self.mode == "exit-on-wake":
            os._exit(7)
        self.asleep = False

    def forget_prefixes(self) -> None:
        if self.running:
            raise EngineBusyError(f"{len(self.running)} are under way")

    def close(self) -> None:
        if self.mode == "slow-close":
            time.sleep(600)


def build(config: EngineConfig, progress: Progress) -> tuple[FakeCore, EngineInfo]:
    mode = sys.argv[1]
    if mode == "no-model":
        raise ModelNotFoundError(f"no model at {config.model}")
    if mode == "build-error":
        raise ZeroDivisionError("a wheel came off")
    if mode == "slow-start":
        time.sleep(600)
    for done in (1, 2, 3):
        progress(done, 3)
    has_tokenizer = config.model is not None and (Path(config.model) / "tokenizer.json").is_file()
    info = EngineInfo(
        model="fake",
        path=config.model if has_tokenizer else None,
        format="safetensors" if has_tokenizer else None,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        sampling_defaults={"temperature": 0.5},
    )
    return FakeCore(mode, float(sys.argv[2]) if len(sys.argv) > 2 else 0.0), info


if __name__ == "__main__":
    sys.exit(run(build))
