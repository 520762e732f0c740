"""The application: routes, and what is answered in OpenAI's error shape."""

from __future__ import annotations

from functools import cache

import msgspec
from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tokenspeed import __version__
from tokenspeed.config.serving import Limits
from tokenspeed.contracts.errors import TokenSpeedError
from tokenspeed.server.admin import admin_routes
from tokenspeed.server.client import NoteCaller
from tokenspeed.server.errors import ApiError, on_bug, on_engine_error, on_http_error, struct_response
from tokenspeed.server.limits import read_body
from tokenspeed.server.openai.chat import chat
from tokenspeed.server.openai.completions import complete
from tokenspeed.server.openai.embeddings import embed
from tokenspeed.server.openai.responses import Model, ModelList
from tokenspeed.server.openai.scoring import rerank, score
from tokenspeed.server.openai.tokenize import detokenize, tokenize, tokenizer_info
from tokenspeed.server.openapi import openapi
from tokenspeed.server.reports import HealthReport, Version
from tokenspeed.server.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """Everything that answers before, while and after `state` has an engine."""
    app = FastAPI(title="TokenSpeed", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.root_path = state.root_path  # put into every scope, before any middleware
    app.include_router(openai_routes(state))
    app.include_router(scoring_routes(state))
    app.include_router(tokenizer_routes(state))
    app.include_router(operator_routes(state))
    app.include_router(admin_routes(state))
    app.add_exception_handler(TokenSpeedError, on_engine_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)
    state.access.guard(app)
    app.add_middleware(NoteCaller)  # the last one added comes first: refusals are named, too
    return app


def openai_routes(state: ServerState) -> APIRouter:
    """The endpoints that OpenAI's clients call."""
    router = APIRouter(prefix="/v1")

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        return await complete(state, await json_body(request, state.limits))

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await chat(state, await json_body(request, state.limits))

    @router.post("/embeddings")
    async def embeddings(request: Request) -> Response:
        return await embed(state, await json_body(request, state.limits))

    @router.get("/models")
    async def models() -> Response:
        info = state.ready().info
        listed = [
            Model(id=name, created=state.created, root=info.model, max_model_len=info.max_model_len)
            for name in state.names
        ]
        return struct_response(ModelList(data=listed))

    return router


def scoring_routes(state: ServerState) -> APIRouter:
    """Scores, as in vLLM, and rankings, as Jina's and Cohere's clients ask for them."""
    router = APIRouter()

    @router.post("/v1/score")
    async def scores(request: Request) -> Response:
        return await score(state, await json_body(request, state.limits))

    @router.post("/rerank")
    @router.post("/v1/rerank")
    async def ranking(request: Request) -> Response:
        return await rerank(state, await json_body(request, state.limits))

    return router


def tokenizer_routes(state: ServerState) -> APIRouter:
    """Text to ids and back, as in vLLM."""
    router = APIRouter()

    @router.post("/tokenize")
    async def text_to_ids(request: Request) -> Response:
        return await tokenize(state, await json_body(request, state.limits))

    @router.post("/detokenize")
    async def ids_to_text(request: Request) -> Response:
        return await detokenize(state, await json_body(request, state.limits))

    @router.get("/tokenizer_info")
    async def about_tokenizer() -> Response:
        return tokenizer_info(state)

    return router


def operator_routes(state: ServerState) -> APIRouter:
    """What an operator and a load balancer ask."""
    router = APIRouter()
    document = cache(lambda: msgspec.json.encode(openapi(state)))

    @router.get("/health")
    async def health() -> Response:
        ok, reason = state.health()
        report = HealthReport(status="ok" if ok else "unavailable", reason=reason)
        return struct_response(report, 200 if ok else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(state.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @router.get("/version")
    async def version() -> Response:
        return struct_response(Version(version=__version__))

    @router.get("/openapi.json")
    async def schema() -> Response:
        return Response(document(), media_type="application/json")

    return router


async def json_body(request: Request, limits: Limits) -> bytes:
    """The body. Raises ApiError 415 for another type: a page of another site can send those without asking; 413 and 408
    as `read_body` does."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, got {kind or 'none'}")
    return await read_body(request, limits)
