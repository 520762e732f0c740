"""A server of known timing: `python -m tests.bench.stub_server` prints its address. The name of the model says what it
does: plain, pairs (two tokens per event), crlf, no-usage, http-500, error-event, cut, garbage, empty, hang."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

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
        await asyncio.sleep(self.first_s)
        await self._events(send, writer, body, mode)
        send("[DONE]")
        writer.write(b"0\r\n\r\n")

    async def _events(self, send: Any, writer: asyncio.StreamWriter, body: Any, mode: str) -> None:
        tokens = body["max_tokens"]
        for number in range(0, 0 if mode == "empty" else tokens, 2 if mode == "pairs" else 1):
            await asyncio.sleep(self.gap_s if number else 0)
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
            text = {"delta": {"content": "x"}} if "messages" in body else {"text": "x", "finish_reason": None}
            send(json.dumps({"choices": [text]}))
        if mode != "no-usage":
            details = {"prompt_tokens_details": {"cached_tokens": 2}}
            send(json.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens} | details}))


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


async def main() -> None:
    stub = Stub(*map(float, sys.argv[1:]))
    server = await asyncio.start_server(stub.connected, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
