"""Lines in pieces, what a line of a batch asks for, and the file of results that is gone on with."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.seeds import SEED
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.server.batch.lines import Line, open_lines, split_lines
from tokenspeed.server.batch.requests import BatchRequest, custom_id_of, line_fields, request_of
from tokenspeed.server.batch.results import key_of_custom_id, key_of_line, open_results, result
from tokenspeed.server.errors import ApiError

URLS = ("/v1/completions", "/v1/embeddings")
GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": URLS[0], "body": {"prompt": "x"}}


def chopped(raw: bytes, rng: random.Random) -> Any:
    """A reader that gives as little as it likes."""
    stream = io.BytesIO(raw)
    return lambda most: stream.read(rng.randint(1, 9))


@pytest.mark.parametrize("seed", [SEED + i for i in range(20)])
def test_lines_do_not_depend_on_how_they_come(seed: int) -> None:
    rng = random.Random(seed)
    lines = [bytes(rng.choice(b"ab\r\x85") for _ in range(rng.randrange(12))) for _ in range(rng.randrange(1, 9))]
    ended = rng.random() < 0.5
    raw = b"\n".join(lines) + b"\n" * ended
    found = list(split_lines(chopped(raw, rng), most=7))
    expected = lines if ended or lines[-1] else lines[:-1]
    assert [line.raw for line in found] == [line[:7] for line in expected]
    assert [line.cut for line in found] == [len(line) > 7 for line in expected]
    assert [line.number for line in found] == list(range(1, len(expected) + 1))
    assert all(line.ended for line in found[:-1])
    assert all(raw[: line.end - line.ended].endswith(whole) for line, whole in zip(found, expected, strict=True))
    if found:
        assert (found[-1].end, found[-1].ended) == (len(raw), raw.endswith(b"\n"))


def line(text: str | bytes, number: int = 9) -> Line:
    raw = text.encode() if isinstance(text, str) else text
    return Line(number, raw, False, True, len(raw))


def asked(text: str | bytes) -> BatchRequest:
    fields = line_fields(line(text))
    custom_id_of(fields, 9)
    return request_of(fields, 9, URLS)


def test_a_good_line() -> None:
    text = json.dumps(GOOD | {"body": {"prompt": "ü", "stream": False}})
    assert asked(text) == (URLS[0], json.dumps({"prompt": "ü", "stream": False}).encode())
    assert custom_id_of(line_fields(line(text)), 9) == "a"
    assert asked(json.dumps(GOOD | {"body": {"stream": "no"}})).url == URLS[0]  # for the endpoint to refuse


@pytest.mark.parametrize(
    "text, status, code, complaint",
    [
        ("{", 400, "invalid_json_line", "line 9 is not a JSON object"),
        ("[1]", 400, "invalid_json_line", "line 9 is not a JSON object: Expected `object`, got `array`"),
        (b'{"\xff": 1}', 400, "invalid_json_line", "line 9 is not a JSON object"),
        ('{"body": ' + "[" * 10**5 + "]" * 10**5 + "}", 400, "invalid_json_line", "line 9 is not a JSON object"),
        ({"custom_id": None}, 400, "invalid_line", "line 9: custom_id must be a text"),
        ({"custom_id": 7}, 400, "invalid_line", "line 9: custom_id must be a text"),
        ({"custom_id": ""}, 400, "invalid_line", "line 9: custom_id is empty"),
        ({"custom_id": ...}, 400, "invalid_line", "line 9: custom_id is missing"),
        (b'{"custom_id": "\xff"}', 400, "invalid_line", "line 9: custom_id must be a text"),
        ({"method": "GET"}, 405, "invalid_method", "line 9: method must be POST, got 'GET'"),
        ({"method": ...}, 400, "invalid_line", "line 9: method is missing"),
        ({"url": "/v1/images"}, 404, "invalid_url", "line 9: no url '/v1/images' in a batch .known: /v1/completions, "),
        ({"url": 5}, 400, "invalid_line", "line 9: url must be a text"),
        ({"body": ...}, 400, "invalid_line", "line 9: body is missing"),
        ({"bdy": 1, "abc": 2}, 400, "invalid_line", "line 9: unknown field: abc, bdy"),
        ({"body": {"stream": True}}, 400, "unsupported_parameter", "line 9: stream does not go with a batch"),
    ],
)
def test_what_is_wrong_with_a_line(text: Any, status: int, code: str, complaint: str) -> None:
    if isinstance(text, dict):
        text = json.dumps({name: value for name, value in (GOOD | text).items() if value is not ...})
    with pytest.raises(ApiError, match=complaint) as caught:
        asked(text)
    assert (caught.value.status, caught.value.code) == (status, code)


def test_a_line_that_is_too_long() -> None:
    with pytest.raises(ApiError, match="line 3 is longer than 33554432 bytes") as caught:
        line_fields(Line(3, b"{", True, True, 10**9))
    assert (caught.value.status, caught.value.code) == (413, "line_too_long")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing: cannot be read \(No such file"):
        open_lines(str(tmp_path / "nothing"))
    for path in (tmp_path, tmp_path / "nowhere" / "out"):
        with pytest.raises(ConfigError, match="cannot be written"):
            open_results(str(path))


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_results_are_gone_on_with(tmp_path: Path) -> None:
    path, bad = tmp_path / "out.jsonl", line("{", 4)
    first = open_results(str(path))
    assert (first.finished, first.num_failed) == (set(), 0)
    first.add(result(key_of_custom_id("a"), "a", 200, b'{"x":1}'))
    with pytest.raises(ConfigError, match=r"out\.jsonl: another run writes it"):
        open_results(str(path))
    first.add(result(key_of_custom_id("b"), "b", 404, b'{"error":{}}'))
    first.close()
    whole = path.read_bytes()
    for torn in (b"", b"{", b'{"id":"batch_r', b'{"id":"batch_req_0' + b"9" * 10**6):
        path.write_bytes(whole + torn)
        again = open_results(str(path))
        assert path.read_bytes() == whole
        assert again.finished == {key_of_custom_id("a"), key_of_custom_id("b")}
        assert again.num_failed == 1
        again.close()
    again = open_results(str(path))
    again.add(result(key_of_line(bad), None, 400, b"{}"))
    again.close()
    assert [(made["custom_id"], made["response"]["status_code"]) for made in written(path)] == [
        ("a", 200),
        ("b", 404),
        (None, 400),
    ]
    assert written(path)[0]["response"]["body"] == {"x": 1}
    again = open_results(str(path))
    assert key_of_line(bad) in again.finished
    assert key_of_line(line("{", 5)) not in again.finished
    again.close()


@pytest.mark.parametrize("text", ["hello\n", "hello", "[]\n", '{"id": 3}\n', '{"custom_id": "a"}\n', "\n", "\xff\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"notes\.txt: line 1 is no result of a batch: choose another output file"):
        open_results(str(path))
    assert path.read_bytes() == text.encode("latin-1")


def test_what_is_no_file_is_only_written_to() -> None:
    results = open_results("/dev/null")
    results.add(result(key_of_custom_id("a"), "a", 200, b"{}"))
    results.close()
    results = open_results("/dev/full")
    with pytest.raises(ConfigError, match=r"/dev/full: cannot be written \(No space"):
        results.add(result(key_of_custom_id("a"), "a", 200, b"{}"))
    results.close()
