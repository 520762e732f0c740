"""Sending what a request gives, as one JSON body or as server-sent events, for as long as its client is there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenspeed.server.direct import TextWriter, WriteText, direct_writer
from tokenspeed.server.errors import api_error, encode_error

logger = logging.getLogger("tokenspeed.server")
DONE = b"data: [DONE]\n\n"
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_encode = msgspec.json.encode


def event(data: Any) -> bytes:
    """One event; `data` is whatever msgspec encodes."""
    return b"data: " + _encode(data) + b"\n\n"


def text_writer(writer: TextWriter, example: Callable[[str], bytes]) -> WriteText:
    """Writes events that differ in nothing but a text. example: the event of a text, which it holds once."""
    mark = secrets.token_hex()
    before, after = example(mark).split(_encode(mark))
    return writer(before, after)


class WhileConnected(Response):
    """Runs `work(send, writer)`, and cancels it when the client goes away. writer: see `direct_writer`.

    What `work` raises before it has sent anything becomes an error response of the application's handlers.
    """

    def __init__(self, work: Callable[[Send, TextWriter | None], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(send, direct_writer(scope)))
        client = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({work, client}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            await _cancel(work, client)


def json_reply(body: Awaitable[Any]) -> WhileConnected:
    """Await a body, then send it."""

    async def work(send: Send, _writer: TextWriter | None) -> None:
        encoded = _encode(await body)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(encoded)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": encoded})

    return WhileConnected(work)


def event_reply(events: AsyncGenerator[bytes, None], push: Callable[[TextWriter], None]) -> WhileConnected:
    """Send events as they come, each in one write, then [DONE].

    The status line waits for the first event: a request that fails before it gets the status of its error. What fails
    later ends the stream with an error event. push: after the first event, told of a way to write others past
    `events`, where there is one.
    """

    async def work(send: Send, writer: TextWriter | None) -> None:
        async with contextlib.aclosing(events):
            first = await anext(events)
            await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            if writer is not None:
                push(writer)
            try:
                async for encoded in events:
                    await send({"type": "http.response.body", "body": encoded, "more_body": True})
            except Exception as error:
                await send({"type": "http.response.body", "body": _error_event(error), "more_body": True})
            await send({"type": "http.response.body", "body": DONE})

    return WhileConnected(work)


def _error_event(error: Exception) -> bytes:
    told = api_error(error)
    if told.status == 500:
        logger.error("a stream failed", exc_info=error)
    return b"data: " + encode_error(told) + b"\n\n"


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
