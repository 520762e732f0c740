"""What can sleep: the KV cache. The names are vLLM's."""

from __future__ import annotations

from collections.abc import Sequence

from tokenspeed.contracts.errors import EngineAsleepError, ParameterError, UnsupportedError

TAGS = ("weights", "kv_cache")


def check_level(level: int) -> None:
    """Raise UnsupportedError for anything but level 1: the KV cache gives its memory back, weights stay."""
    if level != 1:
        raise UnsupportedError(f"sleep level {level!r} is not supported, only 1: the KV cache sleeps and weights stay")


def wakes_cache(tags: Sequence[str] | None) -> bool:
    """Whether waking `tags`, None for all, wakes the KV cache. Raises ParameterError for an unknown one."""
    unknown = [tag for tag in tags or () if tag not in TAGS]
    if unknown:
        raise ParameterError(f"tags must be of {', '.join(TAGS)}, got {unknown[0]!r}")
    return tags is None or "kv_cache" in tags


def asleep_error() -> EngineAsleepError:
    """What a request gets that comes too early."""
    return EngineAsleepError("the engine sleeps and takes no requests: call wake_up first")
