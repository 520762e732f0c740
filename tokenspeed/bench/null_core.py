"""An engine process that computes nothing but schedules as ever, one step per STEP_MS: `python -m
tokenspeed.bench.null_core STEP_MS`. What is left of a request's time and cost is the serving itself.

Its tokenizer is the demo model's; a sample says the ids from FIRST_TOKEN on, by position.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import msgspec

from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.config.demo import DEMO_NAME, demo_model_path
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.executor import Executor
from tokenspeed.contracts.step import StepPlan, StepResult
from tokenspeed.engine.core import StepLoop
from tokenspeed.engine.loop import Progress, run
from tokenspeed.engine.messages import EngineInfo
from tokenspeed.runner.null import NullExecutor
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler

MAX_MODEL_LEN = 4096
NUM_PAGES = 1 << 17
VOCAB_SIZE = 32_000
FIRST_TOKEN = 1_000
"""Past the ids without text."""


@dataclass(frozen=True, slots=True)
class _Due:
    step: StepResult
    at: float

    def result(self) -> StepResult:
        left = self.at - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return self.step


class PacedExecutor(NullExecutor):
    """A device on which each step takes `step_s`, one after the other."""

    max_in_flight = 2

    def __init__(self, step_s: float) -> None:
        super().__init__(VOCAB_SIZE, FIRST_TOKEN)
        self._step_s, self._free = step_s, 0.0

    def launch(self, plan: StepPlan) -> _Due:  # type: ignore[override]
        """Begin the step when the one before it ends."""
        self._free = max(self._free, time.perf_counter()) + self._step_s
        return _Due(super().launch(plan).step, self._free)


class NullCore(StepLoop):
    """Implements `engine.loop.Core`."""

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        size = config.block_size
        cache = CacheManager(NUM_PAGES, size, root_key("", "", size))
        limits = SchedulerConfig(config.max_num_seqs, config.step_tokens("cpu"), MAX_MODEL_LEN)
        super().__init__(Scheduler(limits, cache), executor)

    def stats(self) -> dict[str, float]:
        return msgspec.structs.asdict(self.scheduler.stats())


def build(config: EngineConfig, progress: Progress) -> tuple[NullCore, EngineInfo]:
    """Nothing to load."""
    info = EngineInfo(
        model=DEMO_NAME,
        path=str(demo_model_path()),
        format="gguf",
        max_model_len=MAX_MODEL_LEN,
        vocab_size=FIRST_TOKEN + VOCAB_SIZE,
        max_num_seqs=config.max_num_seqs,
        num_pages=NUM_PAGES,
        block_size=config.block_size,
    )
    return NullCore(config, PacedExecutor(float(sys.argv[1]) / 1e3)), info


if __name__ == "__main__":
    sys.exit(run(build))
