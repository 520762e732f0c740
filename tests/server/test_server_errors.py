"""What goes wrong around a request: refusals, clients that leave, an engine that dies, a server that ends."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx2
import openai
import pytest

from tests.server.conftest import Serve, Served
from tests.server.fake_engine import REFUSED, FakeEngine
from tokenspeed.contracts.errors import EngineDeadError
from tokenspeed.engine.async_engine import Health
from tokenspeed.observability.metrics import STEP_BOUNDS
from tokenspeed.server.state import ServerState

HELD = 4
"""Tokens that a held engine gives before it waits."""


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def open_stream(served: Served, **fields: Any) -> socket.socket:
    """A raw connection that has sent a streaming request, and has got its first event."""
    body = json.dumps({"prompt": "x" * 20, "max_tokens": 30, "stream": True} | fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    client = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=30)
    client.sendall(head.encode() + b"\r\n\r\n" + body)
    got = b""
    while b"data: " not in got:
        more = client.recv(65536)
        assert more, got
        got += more
    return client


def read_to_the_end(client: socket.socket) -> list[Any]:
    got = b""
    while b"[DONE]" not in got:
        more = client.recv(65536)
        assert more, f"the stream was cut after {got!r}"
        got += more
    return [json.loads(line[6:]) for line in got.split(b"\n") if line.startswith(b"data: {")]


@pytest.mark.parametrize(
    "method, path, status",
    [("GET", "/v1/nothing", 404), ("POST", "/v1/moderations", 404), ("GET", "/v1/completions", 405)],
)
def test_routes_that_are_not_there(served: Served, method: str, path: str, status: int) -> None:
    response = served.client.request(method, path)
    assert response.status_code == status
    error = error_of(response)
    assert path in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types(served: Served, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    response = served.client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


def test_unknown_model(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="served: fake") as caught:
        served.openai.completions.create(model="gpt-9", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_names_it_is_served_under(serve: Serve) -> None:
    served = serve(names=("a", "b"))
    assert [model.id for model in served.openai.models.list()] == ["a", "b"]
    assert served.openai.completions.create(model="b", prompt="x").model == "b"
    assert served.client.post("/v1/completions", json={"prompt": "x"}).json()["model"] == "a"
    with pytest.raises(openai.NotFoundError):
        served.openai.completions.create(model="fake", prompt="x")


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_engine_keeps_its_status(served: Served, stream: bool) -> None:
    response = served.client.post("/v1/completions", json={"prompt": [REFUSED], "stream": stream})
    assert response.status_code == 503
    assert error_of(response)["message"] == "refused by the engine"
    assert "retry-after" in response.headers
    assert served.state.metrics.finished["error"] == 1


def test_one_refused_prompt_refuses_all_and_leaves_none_behind(serve: Serve) -> None:
    served = serve(FakeEngine(held_after=0))
    response = served.client.post("/v1/completions", json={"prompt": [[1, 2], [999]]})
    assert response.status_code == 400
    assert "999" in error_of(response)["message"]
    assert len(served.engine.aborted) == 1
    assert served.do(lambda: served.engine.running) == []


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": ["a" * 20, "b" * 20]}])
def test_a_client_that_leaves_aborts_what_it_asked_for(serve: Serve, fields: dict[str, Any]) -> None:
    served = serve(FakeEngine(held_after=HELD))
    other = open_stream(served)
    leaver = open_stream(served, **fields)
    served.wait(lambda: len(served.engine.running) >= 2)
    stays = served.do(lambda: served.engine.requests[0].request_id)
    leaver.close()
    served.wait(lambda: served.engine.running == [stays])
    assert served.state.metrics.finished["abort"] == fields.get("n", 1) * (2 if "prompt" in fields else 1)
    served.do(served.engine.open.set)
    parts = read_to_the_end(other)
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    other.close()


def test_a_client_that_leaves_before_the_first_token(serve: Serve) -> None:
    served = serve(FakeEngine(held_after=0))
    for stream in (True, False):
        body = json.dumps({"prompt": "x", "stream": stream}).encode()
        client = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        served.wait(lambda: len(served.engine.running) == 1)
        client.close()
        served.wait(lambda: served.engine.running == [])
    assert len(served.engine.aborted) == 2


def test_death_of_the_engine_ends_streams_with_an_error_event(serve: Serve) -> None:
    served = serve(FakeEngine(held_after=HELD))
    clients = [open_stream(served, n=n) for n in (1, 2)]
    served.do(lambda: served.engine.die(EngineDeadError("the engine process was killed by signal 9")))
    for client in clients:
        *_, last = read_to_the_end(client)
        assert last["error"]["type"] == "server_error"
        assert (last["error"]["code"], last["error"]["param"]) == ("engine_dead", None)
        assert "killed by signal 9" in last["error"]["message"]
        client.close()
    response = served.client.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503
    assert error_of(response)["code"] == "engine_dead"
    assert served.client.get("/health").status_code == 503


def test_openais_client_raises_at_the_error_event(serve: Serve) -> None:
    served = serve(FakeEngine(held_after=HELD))
    texts = []

    def read() -> None:
        with served.openai.completions.create(model="fake", prompt="x" * 20, max_tokens=30, stream=True) as stream:
            for chunk in stream:
                texts.append(chunk.choices[0].text)
                if len("".join(texts)) == HELD:
                    served.do(lambda: served.engine.die(EngineDeadError("it broke")))

    with pytest.raises(openai.APIError, match="it broke"):
        read()
    assert "".join(texts) == "X" * HELD


@pytest.mark.parametrize("stream", [True, False])
def test_an_abort_by_the_server_is_an_error_not_an_answer(serve: Serve, stream: bool) -> None:
    served = serve(FakeEngine(held_after=0 if not stream else HELD))
    if stream:
        client = open_stream(served)
        served.do(lambda: served.engine._abort(served.engine.running[0]))
        *_, last = read_to_the_end(client)
        assert last["error"]["code"] == "shutting_down"
        client.close()
    else:
        served.engine.held_after = None
        served.engine.answer = lambda request, index: served.engine._abort(request.request_id) or [65] * 3  # type: ignore[func-returns-value]
        response = served.client.post("/v1/completions", json={"prompt": "x"})
        assert (response.status_code, error_of(response)["code"]) == (503, "shutting_down")
    assert served.state.metrics.finished["abort"] == 1


def test_a_bug_is_told_without_its_insides(serve: Serve) -> None:
    engine = FakeEngine()
    served = serve(engine)
    served.engine.submit = None  # type: ignore[assignment,method-assign]
    response = served.client.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 500
    error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "NoneType" not in error["message"]
    assert httpx2.get(f"{served.url}/health").status_code == 200  # the connection of a bug is closed


def test_health_follows_the_engine(served: Served) -> None:
    assert served.client.get("/health").json() == {"status": "ok", "reason": "idle"}
    served.engine.well = Health(False, "the engine is stuck: no step finished for 61 s")
    response = served.client.get("/health")
    assert (response.status_code, response.json()["reason"]) == (503, served.engine.well.reason)
    served.engine.well = Health(True, "running")
    served.do(lambda: setattr(served.state, "draining", True))
    assert served.client.get("/health").json()["reason"] == "shutting down"
    response = served.client.post("/v1/completions", json={"prompt": "x"})
    assert (response.status_code, error_of(response)["code"]) == (503, "shutting_down")


def test_before_there_is_an_engine() -> None:
    state = ServerState()
    assert state.health() == (False, "loading the model")
    state._report(1, 4)
    assert state.health() == (False, "loading the model: 25%")
    with pytest.raises(Exception, match="loading the model: 25%"):
        state.ready()


def test_metrics_are_prometheus_text(served: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    served.openai.completions.create(model="fake", prompt="abc")
    response = served.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample.value
        for family in families.values()
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert samples["tokenspeed:prompt_tokens_total", None] == 3
    assert samples["tokenspeed:generation_tokens_total", None] == 4
    assert samples["tokenspeed:num_preemptions_total", None] == 4
    assert samples["tokenspeed:num_requests_running", None] == 0
    assert samples["tokenspeed:num_requests_waiting", None] == 3
    assert samples["tokenspeed:kv_cache_usage_perc", None] == 0.25
    assert samples["tokenspeed:prefix_cache_queries_total", None] == 50
    assert samples["tokenspeed:prefix_cache_hits_total", None] == 20
    assert samples["tokenspeed:request_success_total", "stop"] == 1
    assert samples["tokenspeed:time_to_first_token_seconds_count", None] == 1
    assert samples["tokenspeed:floor_share", None] == 0.75
    assert samples["tokenspeed:device_idle_seconds_total", None] == 1.25
    assert samples["tokenspeed:step_time_seconds_sum", None] == 7.5
    assert samples["tokenspeed:step_time_seconds_count", None] == 2 * (len(STEP_BOUNDS) + 1)
    assert samples["tokenspeed:engine_restarts_total", None] == 0
    buckets = [s.value for s in families["tokenspeed:e2e_request_latency_seconds"].samples if "le" in s.labels]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 1
    assert all(sample.labels["model_name"] == "fake" for family in families.values() for sample in family.samples)


def test_what_is_unknown_is_left_out(serve: Serve) -> None:
    text = serve(FakeEngine(knows_device=False)).client.get("/metrics").text
    assert "floor_share" not in text
    assert "device_idle" not in text


def test_version(served: Served) -> None:
    from tokenspeed import __version__

    assert served.client.get("/version").json() == {"version": __version__}
