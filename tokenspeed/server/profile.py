"""Traces of steps as files that chrome://tracing and Perfetto open.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU ("complete events").
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.engine.trace import Span


def profile_folder(path: str) -> Path:
    """The folder of --profile-dir, made where it is missing. Raises ConfigError."""
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--profile-dir {path}: {error.strerror}") from None
    return folder


def write_trace(folder: Path, spans: Sequence[Span]) -> Path:
    """Write a file of its own; returns its path."""
    path = folder / f"steps-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}.json"
    with path.open("xb") as file:
        file.write(msgspec.json.encode(chrome_trace(spans)))
    return path


def chrome_trace(spans: Sequence[Span]) -> dict[str, object]:
    """Times in microseconds since the first of them."""
    first = min((span.start for span in spans), default=0.0)
    events = [
        {
            "name": span.name,
            "cat": "step",
            "ph": "X",
            "ts": 1e6 * (span.start - first),
            "dur": 1e6 * span.seconds,
            "pid": 1,
            "tid": 1,
            "args": {"step": span.step_id, "tokens": span.num_tokens},
        }
        for span in spans
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
