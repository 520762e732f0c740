"""An engine process with the real scheduler and an executor that computes nothing: `python -m tests.engine.null_core`.

A sample's tokens are the positions they stand at.
"""

from __future__ import annotations

import sys

import msgspec

from tests.engine.fake_core import VOCAB_SIZE
from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.config.engine import EngineConfig
from tokenspeed.engine.core import StepLoop
from tokenspeed.engine.loop import Progress, run
from tokenspeed.engine.messages import EngineInfo
from tokenspeed.runner.null import NullExecutor
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler

MAX_MODEL_LEN = 4096
NUM_PAGES = 4096


class NullCore(StepLoop):
    """Implements `loop.Core`."""

    def __init__(self, config: EngineConfig) -> None:
        size = config.block_size
        cache = CacheManager(NUM_PAGES, size, root_key("", "", size))
        limits = SchedulerConfig(config.max_num_seqs, config.max_num_batched_tokens, MAX_MODEL_LEN)
        super().__init__(Scheduler(limits, cache), NullExecutor(VOCAB_SIZE))

    def stats(self) -> dict[str, float]:
        return msgspec.structs.asdict(self.scheduler.stats())


def build(config: EngineConfig, progress: Progress) -> tuple[NullCore, EngineInfo]:
    return NullCore(config), EngineInfo(model="null", max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE)


if __name__ == "__main__":
    sys.exit(run(build))
