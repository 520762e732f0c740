"""The socket pair: order, bounds, messages larger than it, an end that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tests.engine.async_tools import run, until
from tests.seeds import SEED
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine import ipc
from tokenspeed.engine.ipc import MAX_INBOX, EngineChannel, ServingChannel
from tokenspeed.engine.messages import Abort, FromEngine, Loading, Step, Stop, Submit


@asynccontextmanager
async def channels(on_message: Callable[[FromEngine], None]) -> AsyncIterator[tuple[ServingChannel, EngineChannel]]:
    """Both ends in one process."""
    serving = ServingChannel(on_message)
    engine = EngineChannel(os.dup(serving.engine_end.fileno()))
    serving.connected()
    try:
        yield serving, engine
    finally:
        serving.close()
        await asyncio.to_thread(engine.close)
        serving.close()
        serving.send(Stop())


def long_request(request_id: str, count: int) -> Submit:
    ids = random.Random(SEED).choices(range(2**20), k=count)
    return Submit(Request(request_id=request_id, prompt_token_ids=ids, params=SamplingParams(), seed=0))


def test_order_is_kept_and_what_is_taken_at_once_bounded() -> None:
    async def main() -> None:
        got: list[FromEngine] = []
        async with channels(got.append) as (serving, engine):
            serving.send(Abort("before anybody reads"))
            for number in range(MAX_INBOX + 43):
                serving.send(Abort(str(number)))
            ids: list[str] = []
            sizes = []
            while len(ids) < MAX_INBOX + 44:
                batch = engine.receive(wait=True)
                sizes.append(len(batch))
                ids += [message.request_id for message in batch if isinstance(message, Abort)]
            assert ids == ["before anybody reads", *map(str, range(MAX_INBOX + 43))]
            assert min(sizes) >= 1
            assert max(sizes) == MAX_INBOX
            assert engine.receive(wait=False) == []
            for number in range(300):
                engine.send(Loading(number, 300))
            await until(lambda: len(got) == 300)
            assert [message.done for message in got if isinstance(message, Loading)] == list(range(300))

    run(main())


def test_messages_larger_than_the_socket() -> None:
    async def main() -> None:
        got: list[FromEngine] = []
        async with channels(got.append) as (serving, engine):
            sent = [long_request(str(number), count) for number, count in enumerate((700_001, 1, 300_017, 0))]
            for message in sent:
                serving.send(message)
            received: list[object] = []

            def read() -> None:
                while len(received) < len(sent):
                    received.extend(engine.receive(wait=True))
                for number in range(3):
                    update = SequenceUpdate(request_id=str(number), new_token_ids=list(range(400_000 + number)))
                    engine.send(Step([update], number))
                engine.send(Loading(1, 2))
                while len(got) < 4:
                    engine.receive(wait=False)

            await asyncio.to_thread(read)
            assert received == sent
            steps = [message for message in got if isinstance(message, Step)]
            assert [len(step.updates[0].new_token_ids) for step in steps] == [400_000, 400_001, 400_002]
            assert got[3] == Loading(1, 2)

    run(main())


def test_a_serving_process_that_does_not_read_stalls_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc, "MAX_UNREAD", 1 << 20)
    ours, theirs = socket.socketpair()
    engine = EngineChannel(theirs.detach())
    message = Step([SequenceUpdate(request_id="a", new_token_ids=[2**20] * 50_000)], 1)
    sent = 0

    def send() -> None:
        nonlocal sent
        while sent < 60:
            engine.send(message)
            sent += 1

    writer = threading.Thread(target=send)
    writer.start()
    while sent < 4:
        time.sleep(0.001)
    writer.join(0.5)
    assert writer.is_alive()
    assert sent < 40
    ours.setblocking(False)
    received = 0
    while received < 60 * 50_000 * 5:
        if not writer.is_alive():
            engine.receive(wait=False)  # sends what is left
        with contextlib.suppress(BlockingIOError):
            received += len(ours.recv(1 << 20))
    writer.join()
    engine.close()
    ours.close()


def test_an_engine_whose_other_end_is_gone_is_told_to_stop() -> None:
    ours, theirs = socket.socketpair()
    engine = EngineChannel(theirs.detach())
    ours.close()
    engine.send(Loading(0, 1))
    assert engine.receive(wait=True) == [Stop()]
    engine.close()


def test_what_the_engine_starts_does_not_hold_the_connection() -> None:
    ours, theirs = socket.socketpair()
    theirs.set_inheritable(True)
    engine = EngineChannel(theirs.detach())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        engine.close()
        ours.settimeout(20)
        assert ours.recv(1) == b""
        assert child.poll() is None
        child.communicate(b"\n")
    ours.close()


def test_what_the_engine_said_before_its_end_is_read() -> None:
    async def main() -> None:
        got: list[FromEngine] = []
        async with channels(got.append) as (serving, engine):
            engine.send(Loading(0, 1))
            engine.close()
            serving.send(Stop())
            serving.drain()
            assert got == [Loading(0, 1)]
            serving.drain()

    run(main())
