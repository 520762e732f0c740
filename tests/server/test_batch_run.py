"""A batch on an engine without a model: every line answered for itself, as over HTTP, and no line twice."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response

from tests.seeds import SEED
from tests.server.conftest import Serve
from tests.server.fake_engine import MAX_MODEL_LEN, REFUSED, FakeEngine, shout
from tokenspeed.contracts.errors import ConfigError, EngineDeadError
from tokenspeed.contracts.request import Request
from tokenspeed.server.batch.endpoints import ENDPOINTS
from tokenspeed.server.batch.lines import Read, open_lines
from tokenspeed.server.batch.results import open_results
from tokenspeed.server.batch.run import BATCH_LIMITS, Tally, run
from tokenspeed.server.engine import Engine, Progress
from tokenspeed.server.state import ServerState

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TALK = [{"role": "user", "content": "hi"}]


def line(custom_id: Any, url: str = COMPLETIONS, method: str = "POST", **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def batch(
    folder: Path,
    lines: list[str] | Read,
    engine: FakeEngine | None = None,
    in_flight: int = 3,
    start: Callable[[Progress], Awaitable[Engine]] | None = None,
) -> tuple[Tally, list[dict[str, Any]]]:
    """Run in.jsonl into out.jsonl, which may have lines already; the results that the file then has."""
    made = engine or FakeEngine()

    async def started(progress: Progress) -> Engine:
        return made

    path = folder / "out.jsonl"
    if isinstance(lines, list):
        (folder / "in.jsonl").write_text("\n".join(lines))
        read = open_lines(str(folder / "in.jsonl"))
    else:
        read = lines
    state = ServerState((), "plain", limits=BATCH_LIMITS)
    results = open_results(str(path))
    tally = Tally(failed=results.num_failed)
    try:
        run(state, start or started, read, results, tally, in_flight)
    finally:
        if start is None:
            assert made.closed
            assert made.running == []
    return tally, results_in(folder)


def results_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "out.jsonl").read_text().splitlines()]


def by_id(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {made["custom_id"]: made for made in results}


BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "abc", "max_tokens": 3}),
    (COMPLETIONS, {"prompt": ["ab", "c"], "n": 2, "logprobs": 1, "echo": True, "return_token_ids": True}),
    (CHAT, {"messages": TALK, "model": "fake", "stream": False, "top_logprobs": 2, "logprobs": True}),
    (COMPLETIONS, {"prompt": "x" * MAX_MODEL_LEN}),
    (COMPLETIONS, {"prompt": "x", "temprature": 1}),
    (COMPLETIONS, {"prompt": "x", "logits_processors": []}),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}),
    (COMPLETIONS, {"prompt": []}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": TALK, "model": "gpt-9"}),
    (CHAT, {"prompt": "x"}),
    ("/v1/embeddings", {"input": ["abc", "d"], "dimensions": 2}),
    ("/v1/score", {"text_1": "a", "text_2": "b"}),
    ("/v1/rerank", {"query": "a", "documents": ["b"]}),
]
"""All but four are refused."""


def test_answers_are_those_over_http(tmp_path: Path, serve: Serve) -> None:
    served = serve(chat_template="plain")
    lines = [line(str(number), url, **body) for number, (url, body) in enumerate(BODIES)]
    tally, results = batch(tmp_path, lines)
    assert (tally.answered, tally.kept, tally.failed) == (len(BODIES), 0, len(BODIES) - 4)
    found = by_id(results)
    for number, (url, body) in enumerate(BODIES):
        response, made = served.client.post(url, json=body), found[str(number)]
        assert made["response"]["status_code"] == response.status_code
        assert made["error"] is None
        ours, theirs = made["response"]["body"], response.json()
        for volatile in ("id", "created", "timings"):
            assert (ours.pop(volatile, None) is None) == (theirs.pop(volatile, None) is None)
        assert ours == theirs
    assert len({made["id"] for made in results}) == len({made["response"]["request_id"] for made in results}) == 14


def test_limits_of_a_server_do_not_bind_a_batch(tmp_path: Path) -> None:
    many = line("many", prompt=[[1]] * 600, n=2, max_tokens=1)
    _, (made,) = batch(tmp_path, [many])
    assert len(made["response"]["body"]["choices"]) == 1200


BAD: list[tuple[str, str | None, int, str]] = [
    ("{", None, 400, "line 2 is not a JSON object"),
    (line(None, prompt="x"), None, 400, "line 4: custom_id must be a text"),
    (line("get", method="GET", prompt="x"), "get", 405, "line 6: method must be POST"),
    (line("url", "/v1/moderations", input="x"), "url", 404, "line 8: no url '/v1/moderations' in a batch"),
    (line("stream", CHAT, messages=TALK, stream=True), "stream", 400, "line 10: stream does not go with a batch"),
    (line("good 0", prompt="x"), "good 0", 400, "line 12: custom_id 'good 0' is that of an earlier line"),
]


def with_bad_lines() -> list[str]:
    """A good line before each bad one, and at the end; some without content."""
    lines = [text for number, bad in enumerate(BAD) for text in (line(f"good {number}", prompt="ab"), bad[0])]
    return [*lines, "", "  \r", line("last", prompt="ab")]


def test_a_bad_line_is_answered_alone_and_once(tmp_path: Path) -> None:
    tally, results = batch(tmp_path, with_bad_lines())
    assert (tally.answered, tally.failed) == (13, 6)
    failed = [made for made in results if made["error"] is not None]
    assert len(failed) == len(BAD)
    for made, (_, custom_id, status, message) in zip(failed, BAD, strict=True):
        assert (made["custom_id"], made["response"]["status_code"]) == (custom_id, status)
        assert made["error"]["message"].startswith(message)
        assert made["response"]["body"]["error"]["message"] == made["error"]["message"]
    good = [made for made in results if made["error"] is None]
    assert {made["custom_id"] for made in good} == {*(f"good {number}" for number in range(6)), "last"}
    assert all(made["response"]["body"]["choices"][0]["text"] == "AB" for made in good)
    assert len({made["id"] for made in results}) == 13
    again, same = batch(tmp_path, with_bad_lines())
    assert (again.answered, again.kept, again.failed) == (0, 13, 6)
    assert same == results


@pytest.mark.parametrize("seed", [SEED + i for i in range(5)])
def test_a_later_run_does_the_rest(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    lines = with_bad_lines()
    _, whole = batch(tmp_path, lines)
    kept = [text for text in (tmp_path / "out.jsonl").read_text().splitlines(keepends=True) if rng.random() < 0.5]
    (tmp_path / "out.jsonl").write_text("".join(kept) + '{"id":"batch_req_5'[: rng.randrange(18)])
    engine = FakeEngine()
    tally, results = batch(tmp_path, lines, engine, in_flight=rng.randint(1, 9))
    assert (tally.kept, tally.answered, tally.failed) == (len(kept), 13 - len(kept), 6)
    assert results[: len(kept)] == [json.loads(text) for text in kept]
    assert sorted(made["id"] for made in results) == sorted(made["id"] for made in whole)
    assert len(engine.requests) == sum(made["error"] is None for made in results[len(kept) :])


def test_a_duplicate_that_was_answered_first_finishes_nothing(tmp_path: Path) -> None:
    lines = [line("a", prompt="ab"), line("a", prompt="cd")]
    _, whole = batch(tmp_path, lines)
    duplicate = next(made for made in whole if made["error"] is not None)
    (tmp_path / "out.jsonl").write_text(json.dumps(duplicate, separators=(",", ":")) + "\n")
    tally, results = batch(tmp_path, lines)
    assert (tally.kept, tally.answered) == (1, 1)
    assert results[1]["response"]["body"]["choices"][0]["text"] == "AB"


@pytest.mark.parametrize("in_flight", [1, 4])
def test_lines_under_way_are_bounded_and_the_input_is_read_as_it_is_needed(tmp_path: Path, in_flight: int) -> None:
    """The engine waits until as many lines are under way as may be."""
    engine, count, given = FakeEngine(held_after=0), 40, 0
    most = most_read = 0

    def read(_: int) -> bytes:
        nonlocal given
        given += 1
        return line(str(given), prompt="ab").encode() + b"\n" if given <= count else b""

    def answer(request: Request, index: int) -> list[int]:
        nonlocal most, most_read
        most = max(most, len(engine.running))
        most_read = max(most_read, given - (len(engine.requests) - len(engine.running)))
        if len(engine.running) == in_flight:
            engine.open.set()
        return shout(request, index)

    engine.answer = answer
    tally, results = batch(tmp_path, read, engine, in_flight)
    assert tally.answered == len(results) == count
    assert most == in_flight
    assert most_read <= in_flight


@pytest.mark.parametrize("how", ["dies", "hangs", "refuses"])
def test_an_engine_that_fails_ends_the_batch_and_answers_nothing_wrongly(tmp_path: Path, how: str) -> None:
    lines = [line(str(number), prompt=[100 + number], max_tokens=1) for number in range(20)]
    engine = FakeEngine()

    def fail(request: Request, index: int) -> list[int]:
        if request.prompt_token_ids == [110]:
            if how == "dies":
                engine.die(EngineDeadError("the engine process was killed"))
            if how == "hangs":
                engine.hang("the engine is stuck")
                return [1] * 10**6
        return shout(request, index)

    engine.answer = fail
    if how == "hangs":
        engine.held_after = 1
        lines = [text.replace('"max_tokens": 1', '"max_tokens": 2') if '"10"' in text else text for text in lines]
    if how == "refuses":
        lines[10] = line("10", prompt=[REFUSED], max_tokens=1)
    complaint = {"dies": "was killed", "hangs": "is stuck", "refuses": "refused by the engine"}[how]
    with pytest.raises(Exception, match=complaint):
        batch(tmp_path, lines, engine)
    if how == "hangs":
        assert engine.killed == "the engine is stuck"
    early = results_in(tmp_path)
    assert {made["response"]["status_code"] for made in early} == {200}
    assert "10" not in by_id(early)
    tally, results = batch(tmp_path, lines if how != "refuses" else [*lines[:10], *lines[11:]])
    assert tally.kept == len(early)
    assert len(by_id(results)) == len(results) == 20 - (how == "refuses")


@pytest.mark.parametrize("room", [0, 1, 40, 1500])
def test_after_a_result_that_does_not_fit_none_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """The disk takes `room` bytes, refuses one write, and then has room again."""
    path, full = tmp_path / "out.jsonl", False

    class Disk(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal room, full
            if room == 0 and not full:
                full = True
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = super().write(data if full else data[:room])
            room -= 0 if full else taken
            return taken

    monkeypatch.setattr(io, "FileIO", Disk)
    lines = [line(str(number), prompt="x" * (1 + number), max_tokens=4) for number in range(20)]
    with pytest.raises(ConfigError, match="No space left"):
        batch(tmp_path, lines, in_flight=7)
    assert full
    written = path.read_bytes().split(b"\n")
    whole = [json.loads(text)["custom_id"] for text in written[:-1]]
    tally, results = batch(tmp_path, lines, in_flight=7)
    assert (tally.kept, tally.answered) == (len(whole), 20 - len(whole))
    assert sorted(by_id(results)) == sorted(str(number) for number in range(20))


def test_a_line_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[str] = []

    async def embed(state: ServerState, body: bytes) -> Response:
        if b"bad" in body:
            raise EngineDeadError("gone")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ends.append("cancelled while the engine " + ("was closed" if engine.closed else "lived"))
            raise
        raise AssertionError

    monkeypatch.setitem(ENDPOINTS, "/v1/embeddings", embed)
    engine = FakeEngine()
    with pytest.raises(EngineDeadError, match="gone"):
        batch(tmp_path, [line(text, "/v1/embeddings", input=text) for text in ("good", "well", "bad")], engine)
    assert ends == ["cancelled while the engine lived"] * 2


def test_a_start_that_fails(tmp_path: Path) -> None:
    async def start(progress: Progress) -> Engine:
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing"):
        batch(tmp_path, [line("a", prompt="x")], start=start)
    assert results_in(tmp_path) == []


def test_the_door_for_other_endpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def embed(state: ServerState, body: bytes) -> Response:
        if b"oops" in body:
            raise ZeroDivisionError("a wheel came off")
        return Response(b'{"data":[]}', media_type="application/json")

    monkeypatch.setitem(ENDPOINTS, "/v1/embeddings", embed)
    tally, results = batch(tmp_path, [line(text, "/v1/embeddings", input=text) for text in ("fine", "oops")])
    found = by_id(results)
    assert found["fine"]["response"] | {"request_id": ""} == {
        "status_code": 200,
        "request_id": "",
        "body": {"data": []},
    }
    assert found["oops"]["response"]["status_code"] == 500
    assert found["oops"]["response"]["body"]["error"]["code"] == "internal_error"
    assert tally.failed == 1
    assert "a wheel came off" in caplog.text


def test_input_that_cannot_be_read(tmp_path: Path) -> None:
    def read(_: int) -> bytes:
        raise OSError(5, "Input/output error")

    with pytest.raises(ConfigError, match=r"the input cannot be read \(Input/output error\)"):
        batch(tmp_path, read)
