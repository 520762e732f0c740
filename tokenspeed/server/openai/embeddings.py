"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import secrets

from starlette.responses import Response

from tokenspeed.engine.output import RequestOutput
from tokenspeed.engine.pooling import embedding_of, embedding_pooling
from tokenspeed.server.generation import Generation
from tokenspeed.server.openai.gather import gather, pooling_usage
from tokenspeed.server.openai.prompts import check_length, plain_prompts
from tokenspeed.server.openai.requests import EMBEDDING, EmbeddingRequest, decode_pooling
from tokenspeed.server.openai.responses import Embedding, Embeddings
from tokenspeed.server.sse import json_reply
from tokenspeed.server.state import ServerState


async def embed(state: ServerState, body: bytes) -> Response:
    """Answer a request. Raises ApiError and the errors of `contracts.errors` for one that is refused."""
    request = decode_pooling(body, EMBEDDING)
    engine = state.ready(request.model)
    state.admission.check(engine)
    pooling = embedding_pooling(request.pooling or "last", request.dimensions, engine.info.hidden_size)
    prompts = await plain_prompts(request.input, 1, state, "input")
    check_length(prompts, engine, "input", output=False)
    generation = Generation(
        engine,
        state.metrics,
        state.admission,
        prompts,
        pooling,
        request_id=f"embd-{secrets.token_hex(12)}",
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
    )
    return json_reply(_embeddings(request, request.model or state.names[0], generation))


async def _embeddings(request: EmbeddingRequest, model: str, generation: Generation) -> Embeddings:
    outputs, _ = await gather(generation)
    data = []
    for index, output in enumerate(outputs):
        data.append(Embedding(index=index, embedding=_shown(request, output)))
        await asyncio.sleep(0)  # many numbers would hold up the streams
    return Embeddings(data=data, model=model, usage=pooling_usage(outputs))


def _shown(request: EmbeddingRequest, output: RequestOutput) -> list[float] | str:
    values = embedding_of(output, request.normalize is not False, request.dimensions)
    if request.encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    found: list[float] = values.tolist()
    return found
