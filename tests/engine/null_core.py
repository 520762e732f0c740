"""An engine process with the real scheduler and an executor that computes nothing: `python -m tests.engine.null_core`.

A sample's tokens are the positions they stand at.
"""

from __future__ import annotations

import sys

from tests.engine.fake_core import VOCAB_SIZE
from tokenspeed.bench.null_core import MAX_MODEL_LEN, NullCore
from tokenspeed.config.engine import EngineConfig
from tokenspeed.engine.loop import Progress, run
from tokenspeed.engine.messages import EngineInfo
from tokenspeed.runner.null import NullExecutor


def null_core(config: EngineConfig) -> NullCore:
    """Without a pace."""
    return NullCore(config, NullExecutor(VOCAB_SIZE))


def build(config: EngineConfig, progress: Progress) -> tuple[NullCore, EngineInfo]:
    return null_core(config), EngineInfo(model="null", max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE)


if __name__ == "__main__":
    sys.exit(run(build))
