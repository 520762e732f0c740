"""An engine process that is killed or stopped while it has all kinds of work."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.seeds import SEED
from tests.server.fault_tools import Proof, completion, connect, done, events, read, tokens_of, until
from tests.server.server_process import ServerProcess, alive, started
from tests.tiny_llama import write_tiny

LONG: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 8000, "ignore_eos": True}
WORK: dict[str, dict[str, Any]] = {
    "stream": {"stream": True},
    "samples": {"stream": True, "n": 3},
    "prompts": {"stream": True, "prompt": [[1, 2], [3, 4, 5]]},
    "whole": {},
    "whole samples": {"n": 2},
}
SAMPLES = 9
"""Of all of them."""
Start = Callable[..., Any]


@contextmanager
def fake_server(tmp_path: Path, *flags: str) -> Iterator[ServerProcess]:
    with started("tests.server.serve_fake", ["ok", "0.003", *flags]) as server:
        server.wait_until_ready()
        yield server


@contextmanager
def real_server(tmp_path: Path, *flags: str) -> Iterator[ServerProcess]:
    folder = str(write_tiny(tmp_path, SEED, max_position_embeddings=8192))
    with started("tests.server.serve_fake", ["real", "0", folder, "--dtype", "float32", *flags]) as server:
        server.wait_until_ready()
        yield server


either = pytest.mark.parametrize("start", [fake_server, pytest.param(real_server, marks=pytest.mark.slow)])


@contextmanager
def working(server: ServerProcess) -> Iterator[dict[str, socket.socket]]:
    """All kinds of requests under way; streams have had an event."""
    with ExitStack() as stack:
        clients = {name: stack.enter_context(closing(connect(server.url))) for name in WORK}
        for name, client in clients.items():
            client.sendall(completion(**LONG | WORK[name]))
        for name, fields in WORK.items():
            if "stream" in fields:
                assert read(clients[name], lambda got: b"data: " in got).startswith(b"HTTP/1.1 200 ")
        until(lambda: num_running(server) == SAMPLES)
        yield clients


def num_running(server: ServerProcess) -> float:
    """As the engine, fake or not, counts its samples."""
    stats = server.get("/admin/state").json()["stats"]
    return stats.get("num_running", stats.get("running", 0))


def check_ends(clients: dict[str, socket.socket], code: str, text: str) -> None:
    """Every stream ends with an error event, every other answer is an error."""
    for name, client in clients.items():
        if "stream" in WORK[name]:
            got = read(client, done)
            assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), (name, got[-200:])
            error = events(got)[-1]["error"]
        else:
            answer = read(client, lambda got: b'"error"' in got)
            assert answer.startswith(b"HTTP/1.1 503 "), (name, answer[:200])
            assert b"retry-after" in answer.lower()
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert (error["code"], error["type"]) == (code, "server_error"), name
        assert text in error["message"], name


@either
def test_killed_under_load(start: Start, tmp_path: Path) -> None:
    with start(tmp_path, "first_delay_s=3") as server:
        proof = Proof(server)
        (engine,) = server.children()
        with working(server) as clients:
            os.kill(engine, signal.SIGKILL)
            check_ends(clients, "engine_dead", "SIGKILL")
        assert server.get("/health").status_code == 503
        server.wait_until_ready()
        proof.check()
        assert server.children() != [engine]
        assert server.terminate() == 0, server.log


@either
def test_stopped_under_load(start: Start, tmp_path: Path) -> None:
    """As one that hangs in a system call: no signal but one reaches it."""
    with start(tmp_path, "--engine-stuck-timeout", "1.5") as server:
        proof = Proof(server)
        (engine,) = server.children()
        with working(server) as clients:
            os.kill(engine, signal.SIGSTOP)
            check_ends(clients, "engine_dead", "the engine is stuck: no step finished")
        server.wait_until_ready()
        proof.check()
        assert not alive(engine)
        assert server.terminate() == 0, server.log


def test_stopped_while_it_has_nothing_to_do(tmp_path: Path) -> None:
    with fake_server(tmp_path, "--engine-stuck-timeout", "1") as server:
        proof = Proof(server)
        (engine,) = server.children()
        os.kill(engine, signal.SIGSTOP)
        assert server.get("/health").json()["reason"] == "idle"
        response = server.post("/v1/completions", prompt=[1])
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
        server.wait_until_ready()
        proof.check()
        assert not alive(engine)


@either
def test_stopped_for_a_moment(start: Start, tmp_path: Path) -> None:
    """A machine that was suspended, or swapped: nothing is lost and nothing is restarted."""
    with start(tmp_path) as server:
        proof = Proof(server)
        engines = server.children()
        asked: dict[str, Any] = {"prompt": [9, 8, 7], "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        whole = server.post("/v1/completions", **asked, return_token_ids=True).json()
        with closing(connect(server.url)) as client:
            client.sendall(completion(**asked, stream=True))
            got = read(client, lambda got: b"data: " in got)
            os.kill(engines[0], signal.SIGSTOP)
            assert server.get("/health").status_code == 200
            os.kill(engines[0], signal.SIGCONT)
            got += read(client, done)
        assert tokens_of(events(got)) == tokens_of([whole])
        assert server.children() == engines
        proof.check()


@pytest.mark.slow
def test_killed_again_while_it_loads(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        proof = Proof(server)
        (engine,) = server.children()
        os.kill(engine, signal.SIGKILL)
        until(lambda: server.children() not in ([], [engine]))
        (second,) = server.children()
        os.kill(second, signal.SIGKILL)
        until(lambda: server.children() not in ([], [second]))
        assert "restart 2 of at most 5" in server.get("/health").json()["reason"]
        server.wait_until_ready()
        proof.check()
        assert server.terminate() == 0, server.log
