"""What bounds a request: the size of its body, what it asks for, and how many wait already."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from starlette.requests import Request

from tokenspeed.config.serving import Limits
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.server.engine import Engine
from tokenspeed.server.errors import ApiError

BODY_S = 120.0
"""How long a body may take to come, where `--request-timeout` does not say less."""
LINGER_S = 1.0
"""How long the rest of a body that is too long is read and dropped: a connection that is closed at once, with bytes
unread, takes the answer with it."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body. Raises ApiError 413 for one that is too long, 408 for one that does not come in time, 400 for one that
    ends early."""
    seconds = BODY_S if limits.request_timeout is None else min(BODY_S, limits.request_timeout)
    try:
        async with asyncio.timeout(seconds):
            body = await _read(request, limits.max_body_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} s", code="timeout") from None
    if body is None:
        raise ApiError(413, f"the body is longer than {limits.max_body_bytes} bytes", code="body_too_long")
    return body


async def _read(request: Request, most: int) -> bytes | None:
    """None for a longer body, as soon as it is seen to be one."""
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told[:20]) > most:
        await _linger(request)
        return None
    chunks, size, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the body was cut short")
        chunks.append(message.get("body", b""))
        size, more = size + len(chunks[-1]), message.get("more_body", False)
        if size > most:
            if more:
                await _linger(request)
            return None
    return b"".join(chunks)


async def _linger(request: Request) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await request.receive()).get("more_body", False):
                pass


def check_params(stop: str | list[str] | None, params: SamplingParams, limits: Limits) -> None:
    """Raise ApiError for what asks for more than this server gives. stop: the request's own, without a template's."""
    for name, asked, most in (
        ("n", params.n, limits.max_n),
        ("logprobs", params.logprobs or 0, limits.max_logprobs),
        ("prompt_logprobs", params.prompt_logprobs or 0, limits.max_logprobs),
    ):
        if asked > most:
            raise ApiError(400, f"{name} must be at most {most} on this server, got {asked}", name)
    _check_texts("stop", [stop] if isinstance(stop, str) else stop or [], limits)
    _check_texts("bad_words", [word for word in params.bad_words if isinstance(word, str)], limits)


def _check_texts(name: str, texts: Sequence[str], limits: Limits) -> None:
    if len(texts) > limits.max_stop:
        text = f"{name} must hold at most {limits.max_stop} texts on this server, got {len(texts)}"
        raise ApiError(400, text, name)
    longest = max(map(len, texts), default=0)
    if longest > limits.max_stop_len:
        text = f"{name}: a text may have {limits.max_stop_len} characters at most on this server, got {longest}"
        raise ApiError(400, text, name)


def check_choices(num_prompts: int, n: int, limits: Limits, name: str = "prompt") -> None:
    """Raise ApiError for more prompts, in the field `name` and with `n` samples each, than one request may have."""
    if num_prompts * n > limits.max_choices:
        text = f"{name}: {num_prompts} prompts of {n} samples, at most {limits.max_choices} in all on this server"
        raise ApiError(400, text, name)


class Admission:
    """Refuses requests while too many wait. Only the event loop's thread touches it.

    The engine's own count may be a quarter of a second old, so sequences without an answer are counted here too, less
    the places that are free.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.unanswered = 0
        """Sequences that were submitted and have given nothing yet."""

    def num_waiting(self, engine: Engine) -> int:
        """Sequences that wait to be computed, about."""
        stats = engine.stats()
        free = max(0, engine.info.max_num_seqs - int(stats.get("num_running", 0)))
        return max(int(stats.get("num_waiting", 0)), self.unanswered - free)

    def check(self, engine: Engine) -> None:
        """Raise ApiError 429 while as many wait as may."""
        waiting = self.num_waiting(engine)
        if waiting >= self.limits.max_queue_len:
            raise ApiError(429, f"{waiting} sequences wait already; try again later", code="queue_full")
