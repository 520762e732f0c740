"""Our server against another one: the same work, alternately, and what is recorded of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.bench.stub_server import Stub, running
from tokenspeed.bench import llama_cpp, server_peer
from tokenspeed.bench.record import read
from tokenspeed.bench.running_server import RunningServer
from tokenspeed.bench.server_peer import PEER_ASKED, Shape, Side, compare, main
from tokenspeed.contracts.errors import ConfigError

SHAPE = Shape(input_len=5, output_len=3)
"""A stub counts five tokens in every prompt."""


class Counting(Stub):
    """Counts no token as cached."""

    cached = 0

    async def _events(self, send: Any, writer: Any, body: Any, mode: str) -> None:
        def sent(data: str) -> None:
            event = json.loads(data)
            if "usage" in event:
                event["usage"]["prompt_tokens_details"]["cached_tokens"] = self.cached
            send(json.dumps(event))

        await super()._events(sent, writer, body, mode)


def test_both_do_the_same_work_by_turns() -> None:
    stubs = [Counting(0.002, 0.001), Counting(0.004, 0.002)]
    with running(stubs[0]) as our_url, running(stubs[1]) as peer_url:
        ours, peer = Side(RunningServer(our_url, 1), SHAPE, {}), Side(RunningServer(peer_url, 2), SHAPE, PEER_ASKED)
        rate, ttft = compare(ours, peer, 2, 3, "make x")
    assert (rate.id, ttft.id) == ("server.peer.c2.tok_s", "server.peer.c2.ttft.p99")
    assert stubs[0].most_running == stubs[1].most_running == 2
    asked = [[{**body, "cache_prompt": None} for body in stub.bodies] for stub in stubs]
    assert sorted(map(str, asked[0])) == sorted(map(str, asked[1]))
    assert len(asked[0]) == 4 * SHAPE.num_requests(2), "three pairs and one to warm up"
    assert len({str(body["prompt"]) for body in asked[0]}) == len(asked[0]), "a prompt came twice"
    assert all(body["temperature"] == 0 and body["ignore_eos"] for body in asked[0])
    assert {body.get("cache_prompt") for body in stubs[1].bodies} == {False}
    assert not any("cache_prompt" in body for body in stubs[0].bodies)
    counted = [8 * SHAPE.num_requests(2) / each.duration_s for each in ours.reports[1:]]
    assert rate.samples["a"] == pytest.approx(counted)
    assert rate.value == pytest.approx(median(counted))
    assert rate.ratio is not None
    assert rate.ratio.count == 3
    assert ttft.samples["b"] == [each.ttft_ms.p99 for each in peer.reports[1:] if each.ttft_ms]
    assert ttft.ratio is not None
    assert ttft.ratio.median == pytest.approx(
        median(a / b for a, b in zip(ttft.samples["a"], ttft.samples["b"], strict=True))
    )


@pytest.mark.parametrize("changes", [{"input_len": 6}, {"output_len": 4}, {"cached": 1}])
def test_other_work_is_no_result(changes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Counting(0.001, 0.0)
    stub.cached = changes.get("cached", 0)
    shape = Shape(**{"input_len": 5, "output_len": 3} | {k: v for k, v in changes.items() if k != "cached"})
    if "output_len" in changes:
        monkeypatch.setattr(server_peer, "ASKED", {"max_tokens": 3})
    with running(stub) as url, pytest.raises(ConfigError, match="other work than the same"):
        Side(RunningServer(url, 1), shape, {}).run(1)


def test_a_request_that_fails_is_no_result() -> None:
    with running(Counting()) as url, pytest.raises(ConfigError, match="6 of 6 requests failed"):
        Side(RunningServer(url, 1), SHAPE, {"model": "http-500"}).run(1)


def test_both_are_set_to_the_same() -> None:
    shape = Shape(threads=3, slots=5, context=100)
    ours, peer = (" ".join(flags) for flags in (shape.our_flags(), shape.peer_flags()))
    assert "--threads 3 --max-num-seqs 5 --max-model-len 100 --no-enable-prefix-caching" in ours
    assert "--threads 3 --threads-batch 3 --parallel 5 --ctx-size 500 --cache-ram 0 --no-cache-prompt" in peer


SERVER = """
import asyncio, sys
from tests.bench.test_server_peer import Counting
async def main():
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = await asyncio.start_server(Counting(0.001, 0.0).connected, "127.0.0.1", port)
    await server.serve_forever()
asyncio.run(main())
"""


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With stubs in the place of both servers."""
    (tmp_path / "llama-server").write_text(f"#!{sys.executable}\n{SERVER}")
    (tmp_path / "llama-server").chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(llama_cpp, "build", lambda targets: tmp_path)
    monkeypatch.setattr(
        server_peer,
        "our_command",
        lambda port, model, *flags: [str(tmp_path / "llama-server"), str(model), "--port", str(port), *flags],
    )
    out = tmp_path / "peer.json"
    sizes = ["--input-len", "5", "--output-len", "2", "--pairs", "2", "--concurrency", "1", "3"]
    assert main(["--model", "/some/where/m.gguf", *sizes, "--out", str(out)]) == 0
    records = {record.id: record for record in read(out)}
    assert set(records) == {f"server.peer.{which}" for which in ("c1.tok_s", "c1.ttft.p99", "c3.tok_s", "c3.ttft.p99")}
    record = records["server.peer.c3.tok_s"]
    assert (record.unit, (record.peer or "").split()[0]) == ("tok/s", "llama.cpp's")
    assert "/some" not in record.command
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].startswith("llama-server --model m.gguf --port ")
    assert main(["--concurrency", "17", "--out", str(out)]) == 2
    assert "16 slots" in capsys.readouterr().err
