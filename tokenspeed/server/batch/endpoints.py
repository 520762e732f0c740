"""What a line of a batch may ask for, and how it is answered: by the server's own code, without a socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response

from tokenspeed.server.errors import api_error, encode_error
from tokenspeed.server.openai.chat import chat
from tokenspeed.server.openai.completions import complete
from tokenspeed.server.openai.embeddings import embed
from tokenspeed.server.openai.scoring import rerank, score
from tokenspeed.server.state import ServerState

logger = logging.getLogger("tokenspeed.server")
Endpoint = Callable[[ServerState, bytes], Awaitable[Response]]
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": chat,
    "/v1/completions": complete,
    "/v1/embeddings": embed,
    "/v1/rerank": rerank,
    "/v1/score": score,
}
"""By url. Each takes the JSON of a request's body."""
UNAVAILABLE = 503
"""The status of what is no request's fault: the engine is gone."""


async def answer(endpoint: Endpoint, state: ServerState, body: bytes) -> tuple[int, bytes]:
    """The status and the JSON that a client would get. Raises the TokenSpeedError of an engine that takes nothing more:
    that is not the request's fault."""
    try:
        return await _sent(await endpoint(state, body))
    except Exception as error:
        told = api_error(error)
        if told.status == UNAVAILABLE:
            raise
        if told.status >= 500:
            logger.error("a line failed", exc_info=error)
        return told.status, encode_error(told)


async def _sent(response: Response) -> tuple[int, bytes]:
    """What a response sends to a client that stays."""
    status, parts = 0, list[bytes]()

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.get_running_loop().create_future()

    await response({"type": "http"}, receive, send)
    return status, b"".join(parts)
