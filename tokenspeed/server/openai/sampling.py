"""From the fields of a request to SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenspeed.contracts.errors import ParameterError
from tokenspeed.contracts.sampling import RequestOutputKind, SamplingParams
from tokenspeed.server.openai.requests import ChatRequest, CompletionRequest, GenerationRequest

SAME_NAME = (
    "allowed_token_ids",
    "bad_words",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "min_p",
    "min_tokens",
    "n",
    "presence_penalty",
    "prompt_logprobs",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "temperature",
    "top_k",
    "top_p",
)
"""Fields that SamplingParams takes as they are."""
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions. A chat may fill the model's length."""
MAX_TOP_LOGPROBS = 20
"""OpenAI's bound for chats."""


def completion_params(request: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """`defaults`: what the checkpoint states. max_tokens 0, for an echo alone, samples one token to be thrown away.

    Raises ParameterError on a value out of range or a contradiction.
    """
    settings = {"max_tokens": COMPLETION_MAX_TOKENS} | _given(request, defaults)
    if request.max_tokens == 0:
        if not request.echo:
            raise ParameterError("max_tokens 0 needs echo")
        settings["max_tokens"] = 1
    if request.logprobs is not None:
        settings["logprobs"] = request.logprobs
        if request.echo:
            settings.setdefault("prompt_logprobs", request.logprobs)
    return SamplingParams.from_dict(settings)


def chat_params(
    request: ChatRequest,
    defaults: Mapping[str, Any],
    template_stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> SamplingParams:
    """template_stop, stop_ids: texts, and tokens, that end a turn under the chat template, besides those of the
    request; tokens are not looked at where ends are ignored.

    Raises ParameterError on a value out of range or a contradiction.
    """
    settings = {"max_tokens": None} | _given(request, defaults)
    if template_stop:
        stop = settings.get("stop", [])
        settings["stop"] = [*([stop] if isinstance(stop, str) else stop), *template_stop]
    if stop_ids and not request.ignore_eos:
        settings["stop_token_ids"] = list(dict.fromkeys([*settings.get("stop_token_ids", ()), *stop_ids]))
    limit = request.max_completion_tokens
    if limit is not None:
        if request.max_tokens not in (None, limit):
            raise ParameterError(f"max_tokens {request.max_tokens} contradicts max_completion_tokens {limit}")
        settings["max_tokens"] = limit
    if request.top_logprobs is not None and not request.logprobs:
        raise ParameterError("top_logprobs needs logprobs")
    if request.logprobs:
        top = request.top_logprobs or 0
        if not 0 <= top <= MAX_TOP_LOGPROBS:
            raise ParameterError(f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}, got {top}")
        settings["logprobs"] = top
    return SamplingParams.from_dict(settings)


def _given(request: GenerationRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name in SAME_NAME if (value := getattr(request, name)) is not None}
    if request.max_tokens is not None:
        values["max_tokens"] = request.max_tokens
    if request.cache_salt == "":
        raise ParameterError("cache_salt must not be empty")
    return {"output_kind": RequestOutputKind.DELTA} | dict(defaults) | values
