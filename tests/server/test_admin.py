"""/admin: who may call it, and what it does to a fake engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from tests.server.conftest import Serve, Served
from tests.server.fake_engine import FakeEngine
from tokenspeed.contracts.errors import ConfigError, EngineDeadError, MemoryLimitError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.server.admin import MAX_PROFILED_STEPS, check_admin
from tokenspeed.server.errors import ApiError
from tokenspeed.server.outage import Outage
from tokenspeed.server.profile import profile_folder

CHANGES = ("pause", "resume", "reset_prefix_cache", "sleep", "wake", "profile")


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def request_from(host: str | None, **headers: str) -> Request:
    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "client": (host, 5) if host else None, "headers": encoded})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_without_a_key_this_machine_may(host: str) -> None:
    check_admin(request_from(host), None)


@pytest.mark.parametrize(
    "request_",
    [
        request_from("10.0.0.1"),
        request_from("::2"),
        request_from("::ffff:10.0.0.1"),
        request_from("localhost.example"),
        request_from(None),
        request_from("127.0.0.1", x_forwarded_for="127.0.0.1"),
        request_from("127.0.0.1", forwarded="for=127.0.0.1"),
        request_from("127.0.0.1", origin="http://page.example"),
        request_from("10.0.0.1", authorization="Bearer None"),
    ],
)
def test_without_a_key_nobody_else_may(request_: Request) -> None:
    with pytest.raises(ApiError, match="this machine alone") as caught:
        check_admin(request_, None)
    assert caught.value.status == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1"])
def test_with_a_key_only_the_key_counts(host: str) -> None:
    check_admin(request_from(host, authorization="Bearer k", x_forwarded_for="9.9.9.9"), "k")
    check_admin(request_from(host, authorization="bearer  k"), "k")
    for wrong in (
        {},
        {"authorization": "Bearer K"},
        {"authorization": "Bearer "},
        {"authorization": "Basic k"},
        {"authorization": "k"},
    ):
        with pytest.raises(ApiError, match="admin key") as caught:
            check_admin(request_from(host, **wrong), "k")
        assert caught.value.status == 401


@pytest.mark.parametrize("name", CHANGES)
def test_every_route_is_guarded(served: Served, name: str) -> None:
    served.state.admin_key = "k"
    response = served.client.post(f"/admin/{name}", json={})
    assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    served.state.admin_key = None
    response = served.client.post(f"/admin/{name}", json={}, headers={"origin": "http://page.example"})
    assert (response.status_code, error_of(response)["code"]) == (403, "forbidden")
    assert (served.engine.paused, served.engine.asleep, served.engine.resets) == (False, False, 0)


def test_the_state_is_guarded_and_other_routes_are_not_there(served: Served) -> None:
    served.state.admin_key = "k"
    assert served.client.get("/admin/state").status_code == 401
    assert served.client.get("/admin/state", headers={"authorization": "Bearer k"}).status_code == 200
    response = served.client.post("/admin/shutdown", headers={"authorization": "Bearer k"})
    assert response.status_code == 404
    assert "/admin/shutdown" in error_of(response)["message"]
    assert served.client.get("/admin/pause", headers={"authorization": "Bearer k"}).status_code == 405


def test_changes(served: Served) -> None:
    def post(name: str, **fields: Any) -> dict[str, Any]:
        response = served.client.post(f"/admin/{name}", json=fields)
        assert response.status_code == 200, response.text
        return response.json()

    assert post("pause")["paused"] is True
    assert served.engine.paused
    assert post("resume")["paused"] is False
    assert post("reset_prefix_cache")["ok"] is True
    assert served.engine.resets == 1
    slept = post("sleep", timeout_s=3)
    assert (slept["asleep"], slept["aborted"]) == (True, 3)
    assert served.engine.asleep
    assert post("wake")["asleep"] is False
    assert not served.engine.asleep
    assert served.client.post("/admin/pause").json()["paused"] is True, "a body is not needed"


def test_state(served: Served) -> None:
    state = served.client.get("/admin/state").json()
    assert (state["ok"], state["reason"], state["models"]) == (True, "idle", ["fake"])
    assert (state["paused"], state["asleep"], state["engine_restarts"]) == (False, False, 0)
    assert state["stats"]["num_waiting"] == 3
    served.do(lambda: served.state.lose_engine(Outage("it fell")))
    state = served.client.get("/admin/state").json()
    assert (state["ok"], state["reason"], state["stats"]) == (False, "it fell", {})
    assert served.client.post("/admin/pause").status_code == 503


def test_what_cannot_be_done_now(serve: Serve) -> None:
    served = serve(FakeEngine(held_after=0))
    stream = served.do(lambda: served.engine.submit([65], SamplingParams(max_tokens=5), request_id="r"))
    response = served.client.post("/admin/reset_prefix_cache")
    assert (response.status_code, error_of(response)["code"]) == (409, "busy")
    assert not stream.output.finished
    served.engine.refusal = MemoryLimitError("somebody has the memory")
    response = served.client.post("/admin/wake")
    assert (response.status_code, error_of(response)["message"]) == (503, "somebody has the memory")
    served.engine.refusal = EngineDeadError("gone")
    assert error_of(served.client.post("/admin/wake"))["code"] == "engine_dead"
    assert error_of(served.client.post("/admin/sleep", json={"level": 2}))["message"].startswith("sleep level 2")


@pytest.mark.parametrize(
    "name, body",
    [
        ("pause", {"now": True}),
        ("sleep", {"level": "1"}),
        ("sleep", {"timeout_s": -1}),
        ("profile", {}),
        ("profile", {"steps": 0}),
        ("profile", {"steps": MAX_PROFILED_STEPS + 1}),
        ("profile", {"steps": 5, "timeout_s": 1e9}),
    ],
)
def test_bodies_that_are_refused(served: Served, tmp_path: Path, name: str, body: dict[str, Any]) -> None:
    served.state.profile_dir = tmp_path
    response = served.client.post(f"/admin/{name}", json=body)
    assert response.status_code == 400
    assert f"/admin/{name}" in error_of(response)["message"]
    assert not served.engine.paused
    assert list(tmp_path.iterdir()) == []


def test_profiles_are_files(served: Served, tmp_path: Path) -> None:
    response = served.client.post("/admin/profile", json={"steps": 3})
    assert (response.status_code, error_of(response)["code"]) == (403, "forbidden")
    assert "--profile-dir" in error_of(response)["message"]
    served.state.profile_dir = tmp_path
    answers = [served.client.post("/admin/profile", json={"steps": 3}).json() for _ in range(2)]
    assert sorted(answer["path"] for answer in answers) == sorted(map(str, tmp_path.iterdir()))
    assert [answer["steps"] for answer in answers] == [3, 3]
    events = json.loads(Path(answers[0]["path"]).read_text())["traceEvents"]
    assert [(event["name"], event["ph"], event["ts"], event["dur"]) for event in events[:3]] == [
        ("launch", "X", 0, 250_000),
        ("collect", "X", 0, 250_000),
        ("launch", "X", 1_000_000, 250_000),
    ]
    assert {event["args"]["step"] for event in events} == {0, 1, 2}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    assert profile_folder(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--profile-dir .*file"):
        profile_folder(str(tmp_path / "file"))


def test_a_body_has_the_bound_of_other_routes(serve: Serve) -> None:
    served = serve(max_body_bytes=100)
    response = served.client.post("/admin/pause", content=b" " * 101)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_long")
    assert served.client.get("/admin/state").json()["paused"] is False
