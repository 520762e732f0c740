"""Settings of the HTTP server, once: its flags are made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from tokenspeed.config.engine import flag
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.sampling import MAX_LOGPROBS, MAX_N


def _limit(default: Any, help: str, least: int, most: float = math.inf) -> Any:
    return field(default=default, metadata={"help": help, "choices": (), "range": (least, most)})


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait. Raises ConfigError on a value that is not usable."""

    max_body_bytes: int = _limit(32 * 2**20, "most bytes of a request's body", 1)
    max_choices: int = _limit(1024, "most choices of one request: prompts times n", 1)
    max_n: int = _limit(128, "most samples of one prompt (n)", 1, MAX_N)
    max_stop: int = _limit(64, "most stop strings of one request", 0)
    max_stop_len: int = _limit(1024, "most characters of a stop string", 1)
    max_logprobs: int = _limit(20, "most alternatives per token (logprobs, prompt_logprobs)", 0, MAX_LOGPROBS)
    max_queue_len: int = _limit(
        1024, "sequences that may wait to be computed; while there are that many, requests get a 429", 1
    )
    request_timeout: float | None = _limit(
        None, "seconds that a request may take in all; by default there is no limit", 0
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, (least, most) = getattr(self, setting.name), setting.metadata["range"]
            if value is None and setting.default is None:
                continue
            if isinstance(value, bool) or not least <= value <= most:
                rule = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise ConfigError(f"{flag(setting.name)} must be {rule}, got {value}")
        if self.request_timeout is not None and not 0 < self.request_timeout < math.inf:
            raise ConfigError(f"{flag('request_timeout')} must be above 0 and finite, got {self.request_timeout}")
