"""`tokenspeed serve` as a process, its engine a fake one in another process: loading, signals, death."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.server.fault_tools import until
from tests.server.server_process import GUARD_S, ServerProcess, alive, started
from tokenspeed.cli.main import main

PROMPT = [1, 2, 3]


def fake(mode: str, step_s: float, *flags: str) -> Any:
    return started("tests.server.serve_fake", [mode, str(step_s), *flags])


@contextmanager
def streaming(server: ServerProcess, tokens: int) -> Iterator[Iterator[Any]]:
    """Events of a stream; two have been read."""
    body = {"prompt": PROMPT, "max_tokens": tokens, "stream": True, "return_token_ids": True}

    def events(response: httpx2.Response) -> Iterator[Any]:
        for line in response.iter_lines():
            if line:
                yield line if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))

    with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=GUARD_S) as response:
        found = events(response)
        next(found)
        next(found)
        yield found


def ask_until_refused(server: ServerProcess) -> None:
    end = time.monotonic() + GUARD_S
    while time.monotonic() < end:
        server.get("/health")


def until_cut(events: Iterator[Any]) -> Iterator[Any]:
    with suppress(httpx2.TransportError):
        yield from events


def test_while_it_loads_and_a_signal_then() -> None:
    with fake("slow-start", 0) as server:
        response = server.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "unavailable")
        assert response.json()["reason"].startswith("loading the model")
        assert server.post("/v1/completions", prompt=PROMPT).json()["error"]["code"] == "loading"
        assert server.get("/v1/models").status_code == 503
        assert server.get("/metrics").status_code == 200
        assert server.get("/version").status_code == 200
        (engine,) = server.children()
        assert server.terminate() == 0, server.log
        assert not alive(engine)


def test_idle_running_and_drained() -> None:
    with fake("ok", 0.01) as server:
        server.wait_until_ready()
        assert server.get("/health").json() == {"status": "ok", "reason": "idle"}
        (engine,) = server.children()
        with streaming(server, 300) as events:
            assert server.get("/health").json() == {"status": "ok", "reason": "running"}
            server.process.send_signal(signal.SIGTERM)
            *parts, done = events
            assert done == "data: [DONE]"
            assert parts[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0, server.log
        assert not alive(engine)
        with pytest.raises(httpx2.TransportError):
            server.get("/health")


def test_nothing_is_accepted_while_it_drains_and_the_rest_is_told_why() -> None:
    with fake("ok", 0.01, "--drain-timeout", "1.5") as server:
        server.wait_until_ready()
        with streaming(server, 4000) as events:
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx2.TransportError):
                ask_until_refused(server)
            *_, error, done = events
        assert (error["error"]["code"], done) == ("shutting_down", "data: [DONE]")
        assert "aborted" in error["error"]["message"]
        assert server.wait() == 0, server.log


def test_a_second_signal_does_not_wait() -> None:
    with fake("ok", 0.01, "--drain-timeout", "500") as server:
        server.wait_until_ready()
        with streaming(server, 4000) as events:
            server.process.send_signal(signal.SIGTERM)
            next(events)
            assert server.terminate() == 0, server.log
            assert not any("length" in str(event) for event in until_cut(events)), "it finished after all"


def test_death_of_an_engine_that_is_not_to_be_restarted() -> None:
    with fake("ok", 0.01, "--max-engine-restarts", "0") as server:
        server.wait_until_ready()
        (engine,) = server.children()
        with streaming(server, 4000) as events:
            os.kill(engine, signal.SIGKILL)
            *_, error, done = events
        assert error["error"]["code"] == "engine_dead"
        assert "SIGKILL" in error["error"]["message"]
        assert done == "data: [DONE]"
        until(lambda: "--max-engine-restarts allows 0" in server.get("/health").json()["reason"])
        response = server.get("/health")
        assert response.status_code == 503
        assert "SIGKILL" in response.json()["reason"]
        refused = server.post("/v1/completions", prompt=PROMPT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        assert server.terminate() == 0, server.log


def test_a_client_that_leaves_is_aborted_in_the_engine() -> None:
    with fake("ok", 0.005) as server:
        server.wait_until_ready()
        with streaming(server, 4000):
            pass
        end = time.monotonic() + GUARD_S
        while 'finished_reason="abort",model_name="fake"} 1.0' not in server.get("/metrics").text:
            assert time.monotonic() < end
        while server.get("/health").json()["reason"] != "idle":
            assert time.monotonic() < end
        body = server.post("/v1/completions", prompt=PROMPT, max_tokens=2, return_token_ids=True).json()
        assert body["choices"][0]["token_ids"] == [1, 2]
        assert server.terminate() == 0, server.log


def test_a_log_of_json() -> None:
    with fake("ok", 0, "--log-format", "json", "--log-prompts") as server:
        server.wait_until_ready()
        assert server.post("/v1/completions", prompt=PROMPT, max_tokens=2).status_code == 200
        assert server.terminate() == 0
        lines = [json.loads(line) for line in server.log]
    (request,) = (line for line in lines if line["message"] == "request")
    assert (request["prompt_tokens"], request["output_tokens"], request["finish_reason"]) == (3, 2, "length")
    assert request["prompt"] == str(PROMPT)
    assert re.fullmatch("[0-9a-f]{12}", request["client"])


def test_administration(tmp_path: Path) -> None:
    key = {"authorization": "Bearer k"}
    with fake("ok", 0.005, "--admin-key", "k", "--profile-dir", str(tmp_path / "traces")) as server:
        server.wait_until_ready()

        def post(name: str, body: dict[str, Any]) -> Any:
            url = f"{server.url}/admin/{name}"
            return httpx2.post(url, json=body, headers=key, timeout=GUARD_S, verify=False).json()

        assert server.post("/admin/pause").status_code == 401
        assert post("pause", {})["paused"] is True
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{server.url}/v1/completions", json={"prompt": PROMPT}, timeout=0.2, verify=False)
        assert server.get("/health").json() == {"status": "ok", "reason": "paused"}
        assert post("resume", {})["paused"] is False
        assert post("sleep", {})["asleep"] is True
        assert server.post("/v1/completions", prompt=PROMPT).json()["error"]["code"] == "asleep"
        assert post("wake", {})["asleep"] is False
        assert server.post("/v1/completions", prompt=PROMPT).status_code == 200
        made = post("profile", {"steps": 3, "timeout_s": 0})
        assert Path(made["path"]).parent == tmp_path / "traces"
        assert json.loads(Path(made["path"]).read_text())["traceEvents"] == []
        assert server.terminate() == 0, server.log


def test_a_model_that_is_not_there_ends_the_start() -> None:
    with fake("no-model", 0, "some/where") as server:
        assert server.wait() == 1
        assert server.log[-1].startswith("tokenspeed: error: no model at some/where")
        assert "Traceback" not in "\n".join(server.log)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("a", "--model", "b"), "two models: a and --model b"),
        (("--drain-timeout", "-1"), "--drain-timeout must be at least 0"),
        (("--drain-timeout", "nan"), "--drain-timeout must be at least 0"),
        (
            ("--otlp-traces-endpoint", "http://127.0.0.1:1/"),
            "--otlp-traces-endpoint needs the packages opentelemetry-sdk",
        ),
        (("--admin-key", ""), "--admin-key must be of printable ASCII characters and not empty"),
        (("--admin-key", "k "), "--admin-key must have no space around it"),
        (("--admin-key", "schlüssel"), "--admin-key must be of printable ASCII"),
        (("--profile-dir", "/dev/null/traces"), "--profile-dir /dev/null/traces: Not a directory"),
        (("--max-engine-restarts", "-1"), "--max-engine-restarts must be at least 0, got -1"),
        (("--engine-stuck-timeout", "0"), "--engine-stuck-timeout must be above 0, got 0"),
        (("--host", "256.0.0.1"), "cannot listen on --host 256.0.0.1 --port 8000"),
        (("--target-itl-ms", "20.5", "--port", "70000"), "--port must be from 0 to 65535, got 70000"),
    ],
)
def test_flags_that_cannot_be_used(
    flags: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)  # as where it is not installed
    assert main(["serve", *flags]) == 1
    assert complaint in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 1
    assert f"cannot listen on --host 127.0.0.1 --port {port}" in capsys.readouterr().err
