"""A server of known timing: `python -m tests.bench.stub_server` prints its address. The name of the model says what it
does: plain, pairs (two tokens per event), crlf, no-usage, http-500, error-event, cut, garbage, empty, hang."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from time import perf_counter
from typing import Any, Protocol

from tokenspeed.bench.serve import Run, Sender
from tokenspeed.bench.sse_client import Client, Endpoint
from tokenspeed.bench.workload import Workload

FIRST_S = 0.05
GAP_S = 0.01


class Stub:
    """Counts what is under way; keeps every body it was sent."""

    def __init__(self, first_s: float = FIRST_S, gap_s: float = GAP_S) -> None:
        self.first_s, self.gap_s = first_s, gap_s
        self.bodies: list[Any] = []
        self.paths: list[str] = []
        self.headers: list[str] = []
        self.running = self.most_running = self.connections = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lengths = [
                    line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length")
                ]
                body = await reader.readexactly(int(lengths[0])) if lengths else b""
                self.paths.append(head.split()[1])
                self.headers.append(head)
                await self._answer(writer, json.loads(body) if body else None)
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, body: Any) -> None:
        if body is None:
            listed = json.dumps({"object": "list", "data": [{"id": "plain"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(listed) + listed)
            return
        self.bodies.append(body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._stream(writer, body, body["model"])
        finally:
            self.running -= 1

    async def _stream(self, writer: asyncio.StreamWriter, body: Any, mode: str) -> None:
        if mode == "http-500":
            writer.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 7\r\n\r\nno luck")
            return
        end = "\r\n\r\n" if mode == "crlf" else "\n\n"

        def send(data: str) -> None:
            event = f"data: {data}{end}".encode()
            writer.write(b"%x\r\n" % len(event) + event + b"\r\n")

        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if "messages" in body:
            send(json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
        await self._read(body)
        await self._events(send, writer, body, mode)
        send("[DONE]")
        writer.write(b"0\r\n\r\n")

    async def _read(self, body: Any) -> None:
        """The time before the first token."""
        await asyncio.sleep(self.first_s)

    async def _gap(self) -> None:
        """The time between two tokens."""
        await asyncio.sleep(self.gap_s)

    def _choice(self, body: Any) -> dict[str, Any]:
        """A token."""
        return {"delta": {"content": "x"}} if "messages" in body else {"text": "x", "finish_reason": None}

    def _usage(self, body: Any) -> dict[str, Any]:
        return {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}}

    async def _events(self, send: Any, writer: asyncio.StreamWriter, body: Any, mode: str) -> None:
        tokens = body["max_tokens"]
        for number in range(0, 0 if mode == "empty" else tokens, 2 if mode == "pairs" else 1):
            await (self._gap() if number else asyncio.sleep(0))
            if number == 1 and mode == "hang":
                await asyncio.sleep(600)
            if number == 1 and mode == "cut":
                writer.close()
                raise ConnectionError
            if number == 1 and mode == "garbage":
                send("{nonsense")
            if number == 1 and mode == "error-event":
                send(json.dumps({"error": {"message": "the engine died"}}))
                return
            send(json.dumps({"choices": [self._choice(body)]}))
        if mode != "no-usage":
            send(json.dumps({"choices": [], "usage": self._usage(body) | {"completion_tokens": tokens}}))


class Remembering(Stub):
    """Counts prompts word by word, answers each token with a word of its own, and has everything it was ever asked and
    answered in its cache. Modes: forgetful counts the last message or three words alone, no-ids gives no token ids,
    secretive does not tell what was cached."""

    def __init__(self, first_s: float = 0.001, gap_s: float = 0.0) -> None:
        super().__init__(first_s, gap_s)
        self.said: dict[int, list[str]] = {}
        """Words of an answer, or its ids as text, by the id() of its body."""
        self.counted: dict[int, tuple[int, int]] = {}
        """Tokens of a prompt and how many of them were known, by the id() of its body."""
        self._known: list[list[str]] = []
        self._serial = itertools.count(1_000_000)

    async def _read(self, body: Any) -> None:
        prompt = flat(body)
        self.said[id(body)] = []
        self.counted[id(body)] = len(prompt), max((common(prompt, each) for each in self._known), default=0)
        self._known.append(prompt)
        await super()._read(body)

    def _choice(self, body: Any) -> dict[str, Any]:
        number = next(self._serial)
        if "messages" in body:
            self.said[id(body)].append(f"w{number}")
            return {"delta": {"content": f" w{number}"}}
        if body.get("return_token_ids") and body["model"] != "no-ids":
            self.said[id(body)].append(str(number))
            return {"text": f" w{number}", "token_ids": [number]}
        self.said[id(body)].append(f"w{number}")
        return {"text": f" w{number}"}

    def _usage(self, body: Any) -> dict[str, Any]:
        answer = ["<assistant>"] if "messages" in body else []
        self._known.append(flat(body) + answer + self.said[id(body)])
        prompt, cached = self.counted[id(body)]
        if body["model"] == "forgetful":
            prompt = 3
        told = {} if body["model"] == "secretive" else {"prompt_tokens_details": {"cached_tokens": cached}}
        return {"prompt_tokens": prompt} | told


class Stalling(Stub):
    """Gives nobody a token while it reads a prompt of `long` ids or more, which takes `read_s`. The first `slow`
    requests wait a fifth of a second for their first token."""

    def __init__(self, long: int, read_s: float, gap_s: float, slow: int = 0) -> None:
        super().__init__(0.2, gap_s)
        self.long, self.read_s, self.slow = long, read_s, slow
        self.readings: list[tuple[float, float]] = []
        self._one_at_a_time = asyncio.Lock()

    async def _read(self, body: Any) -> None:
        if len(self.bodies) <= self.slow:
            await super()._read(body)
        if len(body["prompt"]) < self.long:
            await self._gap()
            return
        async with self._one_at_a_time:
            begin = perf_counter()
            await asyncio.sleep(self.read_s)
            self.readings.append((begin, perf_counter()))

    async def _gap(self) -> None:
        await super()._gap()
        while self._one_at_a_time.locked():
            await asyncio.sleep(0.001)


def flat(body: Any) -> list[str]:
    """The tokens of a prompt: words, ids as text, and one for the head of each message."""
    if "messages" not in body:
        prompt = body["prompt"]
        return prompt.split() if isinstance(prompt, str) else [str(token) for token in prompt]
    return [word for each in body["messages"] for word in (f"<{each['role']}>", *each["content"].split())]


def common(one: list[str], other: list[str]) -> int:
    """How many tokens they begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@contextlib.contextmanager
def running(stub: Stub) -> Iterator[str]:
    """Serve in a thread; gives the base URL."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(stub.connected, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


class Job(Protocol):
    """A load of `bench serve`."""

    @property
    def work(self) -> Workload: ...

    async def run(self, sender: Sender) -> Run: ...


def done(job: Job, url: str) -> Run:
    """Put a load on a server."""

    async def run() -> Run:
        client = Client(Endpoint.parse(url))
        try:
            return await job.run(Sender(client, job.work.path, 30.0))
        finally:
            client.close()

    return asyncio.run(run())


async def main() -> None:
    stub = Stub(*map(float, sys.argv[1:]))
    server = await asyncio.start_server(stub.connected, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
