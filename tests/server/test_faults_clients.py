"""Clients that leave, do not read, or come in a flood; the engine is the real one, with a tiny model."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from tests.seeds import SEED
from tests.server.fault_tools import JSON, Proof, completion, connect, done, events, head, read, tokens_of, until
from tests.server.server_process import GUARD_S, ServerProcess, started
from tests.tiny_llama import write_tiny

MODEL_LEN = 4096
MODEL_SEED = 8
"""Of weights with which no greedy token compared here has a rival within 0.005: the last bits of the reference's sums
depend on what else runs."""
NAME = "tiny" * 3000
"""Is in every event, which so fills the buffers between server and client."""
BUFFER = 128 * 1024
"""Bytes that the system is asked to hold for a client on either side."""
NUM_SEQS, QUEUE_LEN = 4, 8
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends a reset."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = str(write_tiny(tmp_path_factory.mktemp("faults"), MODEL_SEED, max_position_embeddings=MODEL_LEN))
    flags = ["--dtype", "float32", "--served-model-name", NAME, "--block-size", "4"]
    flags += ["--max-num-seqs", str(NUM_SEQS), "--max-queue-len", str(QUEUE_LEN)]
    with started("tests.server.serve_fake", ["real", "0", f"send_buffer={BUFFER}", folder, *flags]) as made:
        made.wait_until_ready()
        yield made
        assert made.terminate() == 0, made.log


@pytest.fixture
def proven(server: ServerProcess) -> Iterator[ServerProcess]:
    """The server; afterwards nothing may be left of what the test did."""
    proof = Proof(server)
    yield server
    assert server.process.poll() is None, server.log
    proof.check()


def closing_after(request: bytes) -> bytes:
    """The same, of a client that asks nothing more."""
    return request.replace(b"Host: x", b"Host: x\r\nConnection: close", 1)


@dataclass
class Leaver:
    """A client that leaves at a random moment."""

    url: str
    random: random.Random

    async def run(self) -> str:
        """Come and leave; the moment at which it did."""
        await asyncio.sleep(self.random.uniform(0, 0.5))
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rpartition(":")[2]))
        moment = self.random.choice(["connected", "in the head", "in the body", "asked", "waiting", "streaming"])
        with suppress(ConnectionError):
            await self._until(moment, reader, writer)
        self._leave(writer)
        return moment

    async def _until(self, moment: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = self._request(moment)
        body_at = request.index(b"\r\n\r\n") + 4
        end = {
            "connected": 0,
            "in the head": self.random.randint(1, body_at - 1),
            "in the body": self.random.randint(body_at, len(request) - 1),
        }.get(moment, len(request))
        writer.write(request[:end])
        await writer.drain()
        if moment == "waiting":
            await asyncio.sleep(self.random.uniform(0, 0.2))
        for _ in range(self.random.randint(1, 40) if moment == "streaming" else 0):
            if not await reader.readline():
                return

    def _request(self, moment: str) -> bytes:
        fields: dict[str, Any] = {"max_tokens": 2000, "ignore_eos": True, "n": self.random.choice([1, 1, 3])}
        fields["stream"] = moment == "streaming" or self.random.random() < 0.5
        fields["prompt"] = [self.random.randrange(97) for _ in range(self.random.randint(1, 200))]
        return closing_after(completion(**fields))

    def _leave(self, writer: asyncio.StreamWriter) -> None:
        if self.random.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.close()


def aborted(server: ServerProcess) -> float:
    """Samples that were."""
    lines = server.get("/metrics").text.splitlines()
    return float(next(line for line in lines if 'finished_reason="abort"' in line).split()[-1])


@pytest.mark.parametrize("count", [200])
@pytest.mark.parametrize("seed", [SEED])
def test_clients_that_leave_at_random_moments(proven: ServerProcess, count: int, seed: int) -> None:
    asked: dict[str, Any] = {"prompt": [9, 8, 7], "max_tokens": 100, "seed": 3, "ignore_eos": True}
    alone = tokens_of([proven.post("/v1/completions", **asked, return_token_ids=True).json()])
    before = aborted(proven)
    with closing(connect(proven.url)) as stays:
        stays.sendall(completion(**asked, stream=True))
        got = read(stays, lambda got: b"data: " in got)

        async def leave() -> list[str]:
            leavers = [Leaver(proven.url, random.Random(f"{seed} {number}")) for number in range(count)]
            return await asyncio.wait_for(asyncio.gather(*(leaver.run() for leaver in leavers)), GUARD_S)

        assert len(set(asyncio.run(leave()))) == 6
        got += read(stays, done)
    assert tokens_of(events(got)) == alone
    assert aborted(proven) > before


def test_slow_readers_get_everything_and_hold_up_nobody(proven: ServerProcess) -> None:
    asked: dict[str, Any] = {"max_tokens": 150, "temperature": 0, "ignore_eos": True}
    prompts = [[number, 2, 3] for number in (1, 50, 96)]
    alone = [
        tokens_of([proven.post("/v1/completions", prompt=each, return_token_ids=True, **asked).json()])
        for each in prompts
    ]
    slow = [connect(proven.url, BUFFER) for _ in prompts]
    for client, prompt in zip(slow, prompts, strict=True):
        client.sendall(completion(prompt=prompt, stream=True, **asked))
    with closing(connect(proven.url)) as quick:
        quick.sendall(completion(prompt=prompts[0], stream=True, **asked))
        found = events(read(quick, done))
        assert tokens_of(found) == alone[0]
    # The engine has finished what nobody reads.
    until(lambda: proven.get("/health").json()["reason"] == "idle")
    for client, whole in zip(slow, alone, strict=True):
        late = events(read(client, done))
        client.close()
        assert tokens_of(late) == whole
        assert len(late) < len(whole) / 2, "they were not merged"
        assert late[-1]["choices"][0]["finish_reason"] == "length"


def test_a_slow_reader_that_leaves(proven: ServerProcess) -> None:
    with closing(connect(proven.url, BUFFER)) as client:
        client.sendall(completion(max_tokens=4000, ignore_eos=True, stream=True))
        read(client, lambda got: b"data: " in got)


async def ask(url: str, number: int) -> tuple[int, bytes]:
    """Status and answer of one client of a flood; every second one streams."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    fields: dict[str, Any] = {"prompt": [number % 97, 2], "seed": number, "max_tokens": 12, "ignore_eos": True}
    writer.write(closing_after(completion(**fields, stream=number % 2 == 0)))
    got = await reader.read(-1)
    writer.close()
    return int(got.split(b" ", 2)[1]), got


def check_flood(server: ServerProcess, count: int) -> None:
    """The engine stands still while they come, so that it is known how many can be taken."""
    (engine,) = server.children()
    capacity = NUM_SEQS + QUEUE_LEN

    async def flood() -> list[tuple[int, bytes]]:
        asking = [asyncio.ensure_future(ask(server.url, number)) for number in range(count)]
        refused = 0
        while refused < count - capacity:
            await asyncio.sleep(0.01)
            refused = sum(task.done() for task in asking)
        os.kill(engine, signal.SIGCONT)
        return await asyncio.gather(*asking)

    os.kill(engine, signal.SIGSTOP)
    try:
        answers = asyncio.run(asyncio.wait_for(flood(), GUARD_S))
    finally:
        os.kill(engine, signal.SIGCONT)
    taken = {number: got for number, (status, got) in enumerate(answers) if status == 200}
    refusals = [got for status, got in answers if status == 429]
    assert (len(taken), len(refusals)) == (capacity, count - capacity)
    for got in refusals:
        assert b"\r\nretry-after: 1\r\n" in got.lower()
        assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "queue_full"
    for number, got in taken.items():
        alone = server.post(
            "/v1/completions",
            prompt=[number % 97, 2],
            seed=number,
            max_tokens=12,
            ignore_eos=True,
            return_token_ids=True,
        ).json()
        whole = events(got) if number % 2 == 0 else [json.loads(got.partition(b"\r\n\r\n")[2])]
        assert tokens_of(whole) == tokens_of([alone]), number


@pytest.mark.parametrize("count", [3 * (NUM_SEQS + QUEUE_LEN), pytest.param(600, marks=pytest.mark.slow)])
def test_a_flood_is_refused_and_what_was_taken_is_finished(proven: ServerProcess, count: int) -> None:
    before = Proof(proven).resident_mb
    for _ in range(2):  # what the first one took has been given back
        check_flood(proven, count)
        proof = Proof(proven)
        assert proof.resident_mb < before + 40
        proof.check()


def test_clients_that_send_half_and_stop_sending(proven: ServerProcess) -> None:
    """The other half of the connection stays open: who cannot send cannot be waited for."""
    request = completion(max_tokens=3000, ignore_eos=True, stream=True)
    for end in (len(request), len(request) - 3, request.index(b"\r\n\r\n") + 4, 20, 0):
        with closing(connect(proven.url)) as client:
            client.sendall(request[:end])
            client.shutdown(socket.SHUT_WR)
            assert not done(read(client)), "it was finished for somebody who had gone"


def test_a_request_that_waits_behind_another_leaves_with_its_client(proven: ServerProcess) -> None:
    before = aborted(proven)
    with closing(connect(proven.url)) as client:
        long = completion(max_tokens=4000, ignore_eos=True)
        client.sendall(long + long + head("/v1/completions", JSON, "Content-Length: 5") + b"{")
        until(lambda: proven.get("/health").json()["reason"] == "running")
    until(lambda: proven.get("/health").json()["reason"] == "idle")
    assert aborted(proven) == before + 1
