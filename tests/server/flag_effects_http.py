"""What each flag of the server, of access, limits and operations does; a function per flag, in EFFECTS."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.flag_house import ALICE, BOB, House, get, post
from tests.server.server_process import GUARD_S
from tests.server.test_api_keys import make_certificate
from tokenspeed.cli.main import main
from tokenspeed.contracts.errors import ConfigError, EngineDeadError
from tokenspeed.observability.traces import Span
from tokenspeed.server import serve
from tokenspeed.server.access import Access
from tokenspeed.server.logs import set_up_logging

MODELS, STATE = "/v1/models", "/admin/state"
COMPLETE = post("/v1/completions", prompt="ab")
TALK = [{"role": "user", "content": "hi"}]


async def nothing(url: str, engine: FakeEngine) -> None:
    pass


def config_file(house: House) -> None:
    path = house.tmp / "serve.yaml"
    path.write_text("max-n: 2\nmodel: there\n")
    assert house.config("--config", str(path)).engine.model == "there"
    asked = post("/v1/completions", prompt="ab", n=3)
    assert house.statuses(["--config", str(path)], asked) == [400]
    assert house.statuses(["--config", str(path), "--max-n", "3"], asked) == [200]


def host(house: House) -> None:
    async def ask(url: str, engine: FakeEngine) -> None:
        async with httpx2.AsyncClient(base_url=url) as client:
            assert (await client.get("/health")).status_code == 200

    house.serve(["--host", "127.0.0.3"], ask)
    assert house.address().startswith("http://127.0.0.3:")


def port(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        assert main(["serve", "--port", str(number)]) == 1
    house.serve([], nothing)
    assert int(house.address().rpartition(":")[2]) > 0, "0 takes a free one"


def root_path(house: House) -> None:
    flags = ["--root-path", "/llm", "--api-key", ALICE]
    asked = [get(path, ALICE) for path in ("/llm/v1/models", MODELS, "/mlm/v1/models", "/llm/llm/v1/models")]
    assert house.statuses(flags, *asked) == [200, 200, 404, 404]
    asked = [get(path) for path in ("/llm/v1/models", "/llm/health", "/llm/admin/state", "/llmhealth", "/health")]
    assert house.statuses(flags, *asked) == [401, 200, 200, 401, 200]
    assert house.statuses([], get("/llm/v1/models")) == [404]


def served_model_name(house: House) -> None:
    (listed,) = house.talk(["--served-model-name", "large", "small", "large"], get(MODELS))
    assert [model["id"] for model in listed.json()["data"]] == ["large", "small"]
    asked = [post("/v1/completions", prompt="ab", model=name) for name in ("small", "fake")]
    assert house.statuses(["--served-model-name", "large", "small"], *asked) == [200, 404]


class Drained(FakeEngine):
    """Notes how long it may take to drain."""

    timeout = -1.0

    async def drain(self, timeout: float) -> int:
        self.timeout = timeout
        return await super().drain(timeout)


def drain_timeout(house: House) -> None:
    for flag, seconds in (("--drain-timeout", 7.5), ("--shutdown-timeout", 0.0)):
        engine = Drained()
        house.serve([flag, str(seconds)], nothing, engine)
        assert engine.timeout == seconds


def api_key(house: House) -> None:
    flags = ["--api-key", ALICE, "--api-key", BOB]
    asked = [get(MODELS, key) for key in (ALICE, BOB, "sk-eve", "")]
    assert house.statuses(flags, *asked) == [200, 200, 401, 401]
    house.patch.setenv("TOKENSPEED_API_KEY", ALICE)
    assert house.statuses([], *asked) == [200, 401, 401, 401]
    assert house.statuses(["--api-key", BOB], *asked) == [401, 200, 401, 401]


def api_key_file(house: House) -> None:
    path = house.tmp / "digests"
    path.write_text(hashlib.sha256(ALICE.encode()).hexdigest())
    asked = [get(MODELS, key) for key in (ALICE, BOB, "")]
    assert house.statuses(["--api-key-file", str(path)], *asked) == [200, 401, 401]
    assert house.statuses([], *asked) == [200, 200, 200]


def metrics_need_key(house: House) -> None:
    asked = [get("/metrics"), get("/metrics", ALICE)]
    assert house.statuses(["--api-key", ALICE, "--metrics-need-key"], *asked) == [401, 200]
    assert house.statuses(["--api-key", ALICE], *asked) == [200, 200]


def cors_origin(house: House) -> None:
    name, pages = "access-control-allow-origin", ("https://a.example.org", "https://b.example.org")
    asked = [get(MODELS, origin=page) for page in pages]
    found = house.talk(["--cors-origin", pages[0]], *asked)
    assert [response.headers.get(name) for response in found] == [pages[0], None]
    found = house.talk(["--cors-origin", pages[0], "--cors-origin", pages[1]], *asked)
    assert [response.headers.get(name) for response in found] == list(pages)
    assert not any(name in response.headers for response in house.talk([], *asked))


def ssl_certfile(house: House) -> None:
    certificate, key = make_certificate(house.tmp)
    both = house.tmp / "both.pem"
    both.write_text(certificate.read_text() + key.read_text())

    async def ask(url: str, engine: FakeEngine) -> None:
        async with httpx2.AsyncClient(base_url=url, verify=False) as client:
            assert (await client.get("/health")).status_code == 200

    house.serve(["--ssl-certfile", str(both)], ask)
    assert house.address().startswith("https://")


def ssl_keyfile(house: House) -> None:
    certificate, key = make_certificate(house.tmp)
    flags = ["--ssl-certfile", str(certificate)]
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        Access.of(house.config(*flags).access)
    assert Access.of(house.config(*flags, "--ssl-keyfile", str(key)).access).scheme == "https"


def limit(flag: str, value: str, within: dict[str, Any], beyond: dict[str, Any], status: int = 400) -> Any:
    """The effect of a limit on completions: what it lets through, what it refuses and what the default lets through."""

    def effect(house: House) -> None:
        asked = [post("/v1/completions", **{"prompt": "ab"} | fields) for fields in (within, beyond)]
        assert house.statuses([flag, value], *asked) == [200, status]
        assert house.statuses([], *asked) == [200, 200]

    return effect


def max_queue_len(house: House) -> None:
    assert house.statuses(["--max-queue-len", "3"], COMPLETE, engine=FakeEngine(num_waiting=3)) == [429]
    assert house.statuses(["--max-queue-len", "4"], COMPLETE, engine=FakeEngine(num_waiting=3)) == [200]


def request_timeout(house: House) -> None:
    (response,) = house.talk(["--request-timeout", "0.25"], COMPLETE, engine=FakeEngine(held_after=0))
    assert response.status_code == 504
    assert "0.25 s" in response.json()["error"]["message"]


def max_engine_restarts(house: House) -> None:
    async def let_it_die(url: str, engine: FakeEngine) -> None:
        engine.die(EngineDeadError("it was ill"))
        async with httpx2.AsyncClient(base_url=url) as client, asyncio.timeout(GUARD_S):
            while "--max-engine-restarts allows 0" not in (await client.get("/health")).json()["reason"]:
                await asyncio.sleep(0.01)

    house.serve(["--max-engine-restarts", "0"], let_it_die)


def engine_stuck_timeout(house: House) -> None:
    """What comes of it: test_engine_restart.py."""
    house.serve(["--engine-stuck-timeout", "17.5"], nothing)
    assert house.started["stuck_after_s"] == 17.5


def admin_key(house: House) -> None:
    asked = [get(STATE, key) for key in ("root", "x", "")]
    assert house.statuses(["--admin-key", "root"], *asked) == [200, 401, 401]
    assert house.statuses([], *asked) == [200, 200, 200], "from this machine"
    house.patch.setenv("TOKENSPEED_ADMIN_KEY", "x")
    assert house.statuses([], *asked) == [401, 200, 401]
    assert house.statuses(["--admin-key", "root"], *asked) == [200, 401, 401]


def log_format(house: House) -> None:
    made: list[logging.Handler] = []
    house.patch.setattr(logging, "basicConfig", lambda handlers, **_: made.extend(handlers))
    record = logging.LogRecord("here", logging.INFO, "file", 1, "all is well", (), None)
    for flags in ([], ["--log-format", "json"]):
        set_up_logging(house.config(*flags).operations.log_format)
    text, line = (handler.format(record) for handler in made)
    assert text.endswith("INFO all is well")
    assert json.loads(line)["message"] == "all is well"


def request_lines(house: House, *flags: str) -> list[dict[str, Any]]:
    house.log.set_level("INFO", "tokenspeed")
    house.log.clear()
    assert house.statuses(flags, COMPLETE) == [200]
    return [record.__dict__["fields"] for record in house.log.records if record.name == "tokenspeed.request"]


def enable_log_requests(house: House) -> None:
    assert request_lines(house, "--no-enable-log-requests") == []
    for flags in ((), ("--enable-log-requests",)):
        (line,) = request_lines(house, *flags)
        assert line["prompt_tokens"] == 2


def log_prompts(house: House) -> None:
    (line,) = request_lines(house, "--log-prompts")
    assert line["prompt"] == "ab"
    (line,) = request_lines(house)
    assert "prompt" not in line


def uvicorn_log_level(house: House) -> None:
    for level, is_there in (("info", True), ("error", False)):
        house.log.clear()
        house.serve(["--uvicorn-log-level", level], nothing)
        assert any(record.name == "uvicorn.error" for record in house.log.records) is is_there
    logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)


def otlp_traces_endpoint(house: House) -> None:
    spans: list[tuple[str, Span]] = []
    house.patch.setattr(serve, "open_exporter", lambda url: lambda span: spans.append((url, span)))
    assert house.statuses([], COMPLETE) == [200]
    assert spans == []
    assert house.statuses(["--otlp-traces-endpoint", "http://there:4318/v1/traces"], COMPLETE) == [200]
    ((url, span),) = spans
    assert (url, span.name) == ("http://there:4318/v1/traces", "text_completion fake")


def profile_dir(house: House) -> None:
    asked = post("/admin/profile", steps=2)
    assert house.statuses([], asked) == [403]
    (response,) = house.talk(["--profile-dir", str(house.tmp / "traces")], asked)
    (file,) = (house.tmp / "traces").iterdir()
    assert response.json() == {"path": str(file), "steps": 2}


EFFECTS: dict[str, Callable[[House], None]] = {
    "--config": config_file,
    "--host": host,
    "--port": port,
    "--root-path": root_path,
    "--served-model-name": served_model_name,
    "--drain-timeout": drain_timeout,
    "--api-key": api_key,
    "--api-key-file": api_key_file,
    "--metrics-need-key": metrics_need_key,
    "--cors-origin": cors_origin,
    "--ssl-certfile": ssl_certfile,
    "--ssl-keyfile": ssl_keyfile,
    "--max-body-bytes": limit("--max-body-bytes", "99", {}, {"user": "x" * 99}, 413),
    "--max-choices": limit("--max-choices", "4", {"n": 4}, {"n": 5}),
    "--max-n": limit("--max-n", "2", {"n": 2}, {"n": 3}),
    "--max-stop": limit("--max-stop", "1", {"stop": ["x"]}, {"stop": ["x", "y"]}),
    "--max-stop-len": limit("--max-stop-len", "2", {"stop": "xy"}, {"stop": "xyz"}),
    "--max-logprobs": limit("--max-logprobs", "2", {"logprobs": 2}, {"logprobs": 3}),
    "--max-queue-len": max_queue_len,
    "--request-timeout": request_timeout,
    "--max-engine-restarts": max_engine_restarts,
    "--engine-stuck-timeout": engine_stuck_timeout,
    "--admin-key": admin_key,
    "--log-format": log_format,
    "--enable-log-requests": enable_log_requests,
    "--log-prompts": log_prompts,
    "--uvicorn-log-level": uvicorn_log_level,
    "--otlp-traces-endpoint": otlp_traces_endpoint,
    "--profile-dir": profile_dir,
}
