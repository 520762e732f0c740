"""Sampling parameters of one request, in the names of vLLM's offline API."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from tokenspeed.contracts.errors import ParameterError

MAX_LOGPROBS = 64
"""Most alternatives a request may ask for per token."""


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How to choose the tokens of one request.

    temperature: 0 is greedy. top_k: 0 or -1 keeps all. top_p in (0, 1]. seed: None draws one per request.
    logprobs, prompt_logprobs: number of alternatives (0 to 64) beside the token itself; None for none.
    Raises ParameterError on a value out of range; unknown names are refused by `from_dict`, and by the constructor.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self.stop_token_ids = list(self.stop_token_ids or ())
        for field in ("temperature", "top_p"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ParameterError(f"{field} must be a finite number, got {value!r}")
        _check(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        if self.top_k == -1:
            self.top_k = 0
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                _check_int(field, getattr(self, field), 0, MAX_LOGPROBS)
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, 2**31 - 1)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SamplingParams:
        """Build from untrusted names and values; an unknown name is a ParameterError that lists the known ones."""
        unknown = sorted(set(fields) - set(cls.__struct_fields__))
        if unknown:
            known = ", ".join(cls.__struct_fields__)
            raise ParameterError(
                f"unknown or unsupported sampling parameter: {', '.join(unknown)} (supported: {known})"
            )
        return cls(**fields)


def _check(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise ParameterError(f"{name} must be {rule}, got {value!r}")


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ParameterError(f"{name} must be an integer from {low} to {high}, got {value!r}")
