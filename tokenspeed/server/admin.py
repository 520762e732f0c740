"""What only an operator may do: /admin, behind a key of its own or, without one, from this machine alone."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable
from typing import Annotated, TypeVar

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tokenspeed.config.serving import Limits
from tokenspeed.contracts.errors import DeviceError, EngineBusyError, MemoryLimitError
from tokenspeed.server.errors import ApiError, struct_response
from tokenspeed.server.keys import ApiKeys, bearer, digest_of
from tokenspeed.server.limits import read_body
from tokenspeed.server.profile import write_trace
from tokenspeed.server.state import ServerState

T = TypeVar("T")
MAX_PROFILED_STEPS = 10_000
MAX_WAIT_S = 600.0
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "origin")
"""Headers of requests that come through a proxy or from a page in a browser of this machine."""
Wait = Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT_S)]
Level = Annotated[int, msgspec.Meta(extra_json_schema={"enum": [1]})]
"""The engine refuses others, and says why."""


class SleepBody(msgspec.Struct, forbid_unknown_fields=True):
    """timeout_s: how long requests under way may go on."""

    level: Level = 1
    timeout_s: Wait = 30.0


class ProfileBody(msgspec.Struct, forbid_unknown_fields=True):
    """steps: how many. timeout_s: after that, as many as there were."""

    steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_PROFILED_STEPS)]
    timeout_s: Wait = 60.0


class NoBody(msgspec.Struct, forbid_unknown_fields=True):
    """Nothing may be asked for."""


class AdminState(msgspec.Struct, kw_only=True):
    """What the server and its engine do. stats: the engine's figures."""

    ok: bool
    reason: str
    models: list[str]
    paused: bool
    asleep: bool
    engine_restarts: int
    stats: dict[str, float]
    aborted: int | msgspec.UnsetType = msgspec.UNSET
    """After a call of sleep: requests that it ended."""


class ProfileFile(msgspec.Struct, kw_only=True):
    """path: of a Chrome trace, on the server's machine. steps: how many it holds."""

    path: str
    steps: int


def admin_routes(state: ServerState) -> APIRouter:
    """Each answers with what GET /admin/state says afterwards, but for profile: that names its file."""

    async def guard(request: Request) -> None:
        check_admin(request, state.admin_key)

    router = APIRouter(prefix="/admin", dependencies=[Depends(guard)])

    @router.get("/state")
    async def show() -> Response:
        return struct_response(admin_state(state))

    @router.post("/pause")
    async def pause(request: Request) -> Response:
        await _body(request, state.limits, NoBody)
        state.ready().pause()
        return struct_response(admin_state(state))

    @router.post("/resume")
    async def resume(request: Request) -> Response:
        await _body(request, state.limits, NoBody)
        state.ready().resume()
        return struct_response(admin_state(state))

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache(request: Request) -> Response:
        await _body(request, state.limits, NoBody)
        await _changed(state.ready().reset_prefix_cache())
        return struct_response(admin_state(state))

    @router.post("/sleep")
    async def sleep(request: Request) -> Response:
        body = await _body(request, state.limits, SleepBody)
        aborted = await _changed(state.ready().sleep(body.level, body.timeout_s))
        told = admin_state(state)
        told.aborted = aborted
        return struct_response(told)

    @router.post("/wake")
    async def wake(request: Request) -> Response:
        await _body(request, state.limits, NoBody)
        await _changed(state.ready().wake_up())
        return struct_response(admin_state(state))

    @router.post("/profile")
    async def profile(request: Request) -> Response:
        folder = state.profile_dir
        if folder is None:
            raise ApiError(403, "profiles are off: start the server with --profile-dir", code="forbidden")
        body = await _body(request, state.limits, ProfileBody)
        spans = await _changed(state.ready().profile(body.steps, body.timeout_s))
        path = await asyncio.to_thread(write_trace, folder, spans)
        return struct_response(ProfileFile(path=str(path), steps=sum(span.name == "collect" for span in spans)))

    return router


def check_admin(request: Request, key: str | None) -> None:
    """Raise ApiError: 401 for a wrong or missing key; without a key, 403 for who is not on this machine."""
    if key is not None:
        if not ApiKeys([digest_of(key.encode())]).accept(bearer(request.scope)):
            raise ApiError(401, "wrong or missing admin key: send Authorization: Bearer KEY", code="invalid_api_key")
        return
    forwarded = [name for name in _FORWARDED if name in request.headers]
    if forwarded or request.client is None or not _is_loopback(request.client.host):
        raise ApiError(403, "without --admin-key, /admin answers to this machine alone", code="forbidden")


def admin_state(state: ServerState) -> AdminState:
    """What the server and its engine do now."""
    ok, reason = state.health()
    engine = state.engine if state.outage is None else None
    return AdminState(
        ok=ok,
        reason=reason,
        models=list(state.names),
        paused=engine is not None and engine.is_paused(),
        asleep=engine is not None and engine.is_sleeping(),
        engine_restarts=state.metrics.engine_restarts,
        stats=dict(engine.stats()) if engine is not None else {},
    )


async def _changed(change: Awaitable[T]) -> T:
    """Raises ApiError: 409 where requests are in the way, 503 where a device or its memory is."""
    try:
        return await change
    except EngineBusyError as error:
        raise ApiError(409, str(error), code="busy") from None
    except (MemoryLimitError, DeviceError) as error:
        raise ApiError(503, str(error), code="device") from None


async def _body(request: Request, limits: Limits, kind: type[T]) -> T:
    """The body, which may be left out where all its fields may; bounded as those of other routes."""
    try:
        return msgspec.json.decode(await read_body(request, limits) or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"{request.url.path}: {error}") from None


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
