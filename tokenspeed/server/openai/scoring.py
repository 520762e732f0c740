"""/v1/score and /v1/rerank: how well documents answer a query."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence

from starlette.responses import Response

from tokenspeed.contracts.errors import PromptError
from tokenspeed.engine.output import RequestOutput
from tokenspeed.engine.pooling import pooled_of, probabilities
from tokenspeed.engine.scoring import Scorer, paired
from tokenspeed.server.errors import ApiError
from tokenspeed.server.generation import Generation
from tokenspeed.server.limits import check_choices
from tokenspeed.server.openai.gather import gather, pooling_usage
from tokenspeed.server.openai.prompts import check_length, encode_text
from tokenspeed.server.openai.requests import RERANK, SCORE, PoolingRequest, RerankRequest, decode_pooling
from tokenspeed.server.openai.responses import Ranked, RankedDocument, Ranking, Score, Scores
from tokenspeed.server.sse import json_reply
from tokenspeed.server.state import ServerState


async def score(state: ServerState, body: bytes) -> Response:
    """Answer a request. Raises ApiError and the errors of `contracts.errors` for one that is refused."""
    request = decode_pooling(body, SCORE)
    pairs = paired(request.text_1, request.text_2, ("text_1", "text_2"))
    generation = await _generation(state, request, request.instruction, pairs, "text_2", "score")
    return json_reply(_scores(request.model or state.names[0], generation))


async def rerank(state: ServerState, body: bytes) -> Response:
    """Answer a request. Raises as `score` does."""
    request = decode_pooling(body, RERANK)
    texts = [each if isinstance(each, str) else each.text for each in request.documents]
    if not texts:
        raise ApiError(400, "documents is empty", "documents")
    if request.top_n is not None and request.top_n < 1:
        raise ApiError(400, f"top_n must be 1 at least, got {request.top_n}", "top_n")
    pairs = [(request.query, text) for text in texts]
    generation = await _generation(state, request, request.instruction, pairs, "documents", "rerank")
    return json_reply(_ranking(request, texts, request.model or state.names[0], generation))


async def _generation(
    state: ServerState,
    request: PoolingRequest,
    instruction: str | None,
    pairs: Sequence[tuple[str, str]],
    param: str,
    kind: str,
) -> Generation:
    """param: the field whose texts may be too long or too many."""
    engine, tokenizer = state.ready(request.model), state.tokenizer
    state.admission.check(engine)
    check_choices(len(pairs), 1, state.limits, param)
    scorer = Scorer(tokenizer, engine.info, instruction)
    prompts: list[list[int]] = []
    for pair in pairs:
        ids = [await encode_text(text, tokenizer, special) for text, special in scorer.pieces(*pair)]
        prompts.append([token for part in ids for token in part])
        if not prompts[-1]:
            raise PromptError(f"{param}: both texts of a pair are empty")
        await asyncio.sleep(0)  # many short texts would hold up the streams as one long text does
    check_length(prompts, engine, param, output=False)
    return Generation(
        engine,
        state.metrics,
        state.admission,
        prompts,
        scorer.pooling,
        request_id=f"{kind}-{secrets.token_hex(12)}",
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
    )


async def _scores(model: str, generation: Generation) -> Scores:
    outputs, _ = await gather(generation)
    data = [Score(index=index, score=_score(output)) for index, output in enumerate(outputs)]
    usage = pooling_usage(outputs)
    return Scores(id=generation.request_id, created=int(time.time()), model=model, data=data, usage=usage)


async def _ranking(request: RerankRequest, texts: Sequence[str], model: str, generation: Generation) -> Ranking:
    outputs, _ = await gather(generation)
    results = [Ranked(index=index, relevance_score=_score(output)) for index, output in enumerate(outputs)]
    results.sort(key=lambda each: -each.relevance_score)
    results = results[: request.top_n]
    for each in results if request.return_documents is not False else ():
        each.document = RankedDocument(text=texts[each.index])
    return Ranking(id=generation.request_id, model=model, results=results, usage=pooling_usage(outputs))


def _score(output: RequestOutput) -> float:
    return probabilities(pooled_of(output))[0]
