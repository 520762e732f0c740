"""A server whose engine process is killed, or stuck: told, restarted, serving again."""

from __future__ import annotations

import os
import signal
import time

from tests.engine.fake_core import FATAL
from tests.server.server_process import GUARD_S, ServerProcess, alive
from tests.server.test_serve_process import PROMPT, fake, streaming


def serves(server: ServerProcess) -> bool:
    body = server.post("/v1/completions", prompt=PROMPT, max_tokens=2, return_token_ids=True).json()
    return body["choices"][0]["token_ids"] == [1, 2]


def until_logged(server: ServerProcess, text: str) -> None:
    end = time.monotonic() + GUARD_S
    while not any(text in line for line in server.log):
        assert time.monotonic() < end, server.log
        time.sleep(0.01)


def test_killed_in_the_middle_of_streams() -> None:
    with fake("ok", 0.005, "first_delay_s=3") as server:
        server.wait_until_ready()
        (engine,) = server.children()
        with streaming(server, 4000) as one, streaming(server, 4000) as other:
            os.kill(engine, signal.SIGKILL)
            for events in (one, other):
                *_, error, done = events
                assert (error["error"]["code"], done) == ("engine_dead", "data: [DONE]")
        until_logged(server, "restart 1 of at most 5")
        health = server.get("/health")
        assert health.status_code == 503
        assert "SIGKILL" in health.json()["reason"]
        assert "restart 1 of at most 5 in 10 min" in health.json()["reason"]
        refused = server.post("/v1/completions", prompt=PROMPT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "restarting")
        assert "retry-after" in refused.headers
        assert server.get("/metrics").status_code == 200
        server.wait_until_ready()
        assert serves(server)
        (restarted,) = server.children()
        assert restarted != engine
        assert 'tokenspeed:engine_restarts_total{model_name="fake"} 1.0' in server.get("/metrics").text
        assert 'finished_reason="error",model_name="fake"} 2.0' in server.get("/metrics").text
        assert server.terminate() == 0, server.log
        assert not alive(restarted)


def test_stuck_in_a_step() -> None:
    with fake("hang", 0, "--engine-stuck-timeout", "0.8") as server:
        server.wait_until_ready()
        (engine,) = server.children()
        response = server.post("/v1/completions", prompt=[FATAL])
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
        assert "stuck" in response.json()["error"]["message"]
        server.wait_until_ready()
        assert serves(server)
        assert not alive(engine)
        assert any("in _go_wrong" in line for line in server.log), "no stacks"
        assert server.terminate() == 0, server.log


def test_a_signal_while_it_is_down() -> None:
    with fake("ok", 0) as server:
        server.wait_until_ready()
        (engine,) = server.children()
        os.kill(engine, signal.SIGKILL)
        until_logged(server, "restart 1 of at most 5")
        assert server.terminate() == 0, server.log
