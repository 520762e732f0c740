"""Shows on stderr how far a load is: a bar on a terminal, else lines of the log."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

logger = logging.getLogger("tokenspeed")
LINE_EVERY_S = 10.0


class LoadingReport:
    """Called with bytes done and in all; several loads may come one after the other. The log has a line every
    LINE_EVERY_S seconds where there is no terminal, and one at each load's end."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._done = 0
        self._started = self._said = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < self._done or not self._started:
            self.close()
            self._started = self._said = now
            self._bar = _bar(total)
        self._bar.update(done - self._bar.n)
        self._done = done
        if done >= total:
            seconds = max(now - self._started, 1e-6)
            self.close()
            logger.info("loaded %.2f GB in %.1f s (%.1f GB/s)", total / 1e9, seconds, total / 1e9 / seconds)
        elif now - self._said >= LINE_EVERY_S and not sys.stderr.isatty():
            self._said = now
            logger.info("loading: %.1f of %.1f GB", done / 1e9, total / 1e9)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._done, self._started = None, 0, 0.0

    def __enter__(self) -> LoadingReport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bar(total: int) -> Any:
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(total=total, desc="loading", unit="B", unit_scale=True, leave=False, disable=not terminal)
