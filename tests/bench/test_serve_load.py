"""The load generator against a server of known timing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from tests.bench.stub_server import FIRST_S, GAP_S, Stub, running
from tokenspeed.bench.serve import Load, Measured, Run, drive, first_model
from tokenspeed.bench.serve_report import report
from tokenspeed.bench.sse_client import Client, Endpoint
from tokenspeed.bench.workload import Lengths, Workload
from tokenspeed.contracts.errors import ConfigError

TOKENS = 9


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def url(stub: Stub) -> Iterator[str]:
    with running(stub) as address:
        yield address


def load(url: str, mode: str, count: int, how: Load, api: Any = "completions", timeout: float = 30.0) -> Run:
    async def run() -> Run:
        client = Client(Endpoint.parse(url))
        work = Workload(api, mode, Lengths(5, 5), Lengths(TOKENS, TOKENS))
        try:
            return await drive(client, work.path, work.bodies(count), how, timeout=timeout)
        finally:
            client.close()

    return asyncio.run(run())


@pytest.mark.parametrize("api, mode", [("completions", "plain"), ("chat", "plain"), ("chat", "crlf")])
def test_times_are_those_of_the_server(url: str, stub: Stub, api: str, mode: str) -> None:
    """Bounds are wide: they catch a wrong definition (headers, role, first gap in TPOT), not a busy machine."""
    run = load(url, mode, 6, Load(concurrency=3), api)
    for request in run.requests:
        assert request.error is None
        assert (request.prompt_tokens, request.cached_tokens, request.output_tokens) == (5, 2, TOKENS)
        assert len(request.gaps) == TOKENS - 1
        assert FIRST_S <= request.ttft < request.e2e
        assert request.tpot is not None
        # Not at least the server's own: who reads the first token late has less time for the others.
        assert request.tpot == pytest.approx((request.e2e - request.ttft) / (TOKENS - 1))
        assert request.e2e == pytest.approx(request.ttft + sum(request.gaps))
        assert request.e2e >= FIRST_S + GAP_S * (TOKENS - 1) * 0.9
    # The quickest of six is not far off, even on a busy machine.
    assert min(request.ttft for request in run.requests) < FIRST_S + 0.5
    assert min(request.tpot or 9 for request in run.requests) < GAP_S + 0.1
    assert stub.most_running == 3
    assert stub.connections == 3
    assert {body["model"] for body in stub.bodies} == {mode}
    assert all(body["stream_options"] == {"include_usage": True} for body in stub.bodies)
    assert set(stub.paths) == {"/v1/completions" if api == "completions" else "/v1/chat/completions"}


def test_tokens_are_counted_from_usage_not_from_events(url: str) -> None:
    (request,) = load(url, "pairs", 1, Load(concurrency=1)).requests
    assert (len(request.gaps) + 1, request.output_tokens) == ((TOKENS + 1) // 2, TOKENS)
    assert request.tpot == pytest.approx((request.e2e - request.ttft) / (TOKENS - 1))


@pytest.mark.parametrize(
    "mode, complaint",
    [
        ("no-usage", "no usage in the stream"),
        ("http-500", "HTTP 500: no luck"),
        ("error-event", "the engine died"),
        ("cut", "closed before the response ended"),
        ("garbage", "not an event of this API"),
        ("empty", "no output"),
        ("hang", "no end within 0.3 s"),
    ],
)
def test_what_fails_is_named_and_counted(url: str, mode: str, complaint: str) -> None:
    run = load(url, mode, 3, Load(concurrency=2), timeout=0.3 if mode == "hang" else 30)
    assert len(run.requests) == 3
    for request in run.requests:
        assert request.error is not None
        assert complaint in request.error
    found = report(run)
    assert (found.requests, found.completed, sum(found.errors.values()), found.output_tokens) == (3, 0, 3, 0)
    assert found.ttft_ms is None


def test_nobody_listens() -> None:
    run = load("http://127.0.0.1:9", "plain", 2, Load(concurrency=1))
    assert all(request.error for request in run.requests)

    async def ask() -> str:
        return await first_model(Client(Endpoint.parse("http://127.0.0.1:9")))

    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9 does not list its models"):
        asyncio.run(ask())


def test_the_first_model(url: str, stub: Stub) -> None:
    async def ask() -> str:
        client = Client(Endpoint.parse(url + "/v1/", "secret"))
        try:
            return await first_model(client)
        finally:
            client.close()

    assert asyncio.run(ask()) == "plain"
    assert stub.paths == ["/v1/models"]
    assert "Authorization: Bearer secret" in stub.headers[0]


def test_poisson_arrivals_do_not_wait_for_answers() -> None:
    stub = Stub(first_s=0.3)
    with running(stub) as url:
        run = load(url, "plain", 40, Load(rate=400.0))
    assert all(request.error is None for request in run.requests)
    assert stub.most_running > 10
    sent = [request.sent for request in run.requests]
    assert sent == sorted(sent)
    assert all(0 < request.late < 10 for request in run.requests)
    gaps = [later - earlier for earlier, later in pairwise(sent)]
    assert len({round(gap, 6) for gap in gaps}) > 20, "Poisson gaps differ"
    # 40 exponential gaps of 2.5 ms: below 30 ms in sum happens once in ten million seeds.
    assert sent[-1] - sent[0] > 0.03


def test_closed_loop_keeps_as_many_under_way_and_no_more(stub: Stub) -> None:
    with running(stub) as url:
        load(url, "plain", 12, Load(concurrency=5))
    assert stub.most_running == 5
    assert len(stub.bodies) == 12


@pytest.mark.parametrize("settings", [{}, {"concurrency": 1, "rate": 1.0}, {"concurrency": 0}, {"rate": 0.0}])
def test_loads_that_are_none(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--concurrency|--rate"):
        Load(**settings)


@pytest.mark.parametrize(
    "base_url, host, port, prefix, tls",
    [
        ("http://h", "h", 80, "/v1", False),
        ("https://h", "h", 443, "/v1", True),
        ("http://h:8000/v1", "h", 8000, "/v1", False),
        ("https://h/api/", "h", 443, "/api/v1", True),
    ],
)
def test_addresses(base_url: str, host: str, port: int, prefix: str, tls: bool) -> None:
    found = Endpoint.parse(base_url)
    assert (found.host, found.port, found.prefix, found.tls) == (host, port, prefix, tls)


@pytest.mark.parametrize("base_url", ["", "h:8000", "ftp://h", "http://", "http://h:port", "http://h:99999"])
def test_addresses_that_are_none(base_url: str) -> None:
    with pytest.raises(ConfigError, match="--base-url"):
        Endpoint.parse(base_url)


def test_events_may_come_in_any_pieces() -> None:
    """A parser fed byte by byte finds the same as one that gets all at once."""
    from tokenspeed.bench.sse_client import _Connection

    body = b'data: {"a": 1}\n\n: a comment\n\nevent: x\ndata: [DONE]\n\n'
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    for size in (1, 7, len(raw)):
        found: list[bytes] = []
        connection = _Connection()
        connection._on_event = lambda now, data, found=found: found.append(data)
        for start in range(0, len(raw), size):
            connection.data_received(raw[start : start + size])
        assert found == [b'{"a": 1}', b"[DONE]"]


def test_measured_ignores_what_has_no_output() -> None:
    request = Measured(sent=1.0)
    for now, event in enumerate(
        [
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"reasoning_content": "hm"}}]},
            {"choices": [{"delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}},
        ],
        start=2,
    ):
        request.on_event(float(now), msgspec.json.encode(event))
    request.end()
    assert (request.first, request.last, request.gaps, request.error) == (3.0, 3.0, [], None)
    assert request.tpot is None
