"""The server over `bench.null_core`: `python -m tokenspeed.server.null STEP_MS`; the log names its port."""

from __future__ import annotations

import sys

from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.serving import OperationsConfig
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.server.engine import Engine, Progress
from tokenspeed.server.logs import set_up_logging
from tokenspeed.server.run import Manner, listen, run
from tokenspeed.server.serve import observe_requests
from tokenspeed.server.state import ServerState

MAX_NUM_SEQS = 256


def main(step_ms: str) -> None:
    """Serve until SIGTERM."""
    command = (sys.executable, "-m", "tokenspeed.bench.null_core", step_ms)

    async def start(progress: Progress) -> Engine:
        config = EngineConfig(max_num_seqs=MAX_NUM_SEQS)
        return await AsyncEngine.start(config, core_command=command, progress=progress)

    set_up_logging("text")
    listening = listen("127.0.0.1", 0)
    print(listening.getsockname()[1], flush=True)
    state = ServerState()
    observe_requests(state, OperationsConfig())
    run(state, start, listening, Manner(drain_timeout=0.0, max_engine_restarts=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
