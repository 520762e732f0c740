"""`tokenspeed run-batch` whose engine process is tests/engine/fake_core.py: MODE STEP_SECONDS [FLAGS]. Ends with status
70 if the serving process has imported torch."""

from __future__ import annotations

import sys

from tokenspeed.cli.main import main
from tokenspeed.engine import process

if __name__ == "__main__":
    mode, step_s, *flags = sys.argv[1:]
    process.CORE_COMMAND = (sys.executable, "-m", "tests.engine.fake_core", mode, step_s)  # type: ignore[assignment]
    status = main(["run-batch", *flags])
    sys.exit(70 if "torch" in sys.modules else status)
