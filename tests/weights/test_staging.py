"""A lane's buffer is not written to while a copy from it may be under way."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.weights import staging
from tokenspeed.weights.staging import Lane

Work = Callable[[], None]


class LateStream:
    """Work is done as late as it may be: when somebody waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.work: list[Work] = []
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)

    def synchronize(self) -> None:
        self.run(len(self.work))

    def run(self, count: int) -> None:
        for number in range(count):
            self.work[number]()
            self.work[number] = lambda: None


class LateEvent:
    stream: LateStream | None = None

    def record(self, stream: LateStream) -> None:
        self.stream, self.count = stream, len(stream.work)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        assert self.stream is not None
        self.stream.run(self.count)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateStream]:
    streams: list[LateStream] = []

    def stream(device: torch.device) -> LateStream:
        streams.append(LateStream(device))
        return streams[-1]

    deliver = staging._deliver
    cuda = SimpleNamespace(Stream=stream, Event=LateEvent, set_stream=lambda stream: None)
    fake = SimpleNamespace(cuda=cuda, uint8=torch.uint8, empty=lambda n, **_: torch.zeros(n, dtype=torch.uint8))
    monkeypatch.setattr(staging, "torch", fake)

    def put_off(*arguments: Any) -> None:
        streams[0].work.append(lambda: deliver(*arguments))

    monkeypatch.setattr(staging, "_deliver", put_off)
    return streams


@pytest.mark.parametrize("direct", [True, False])
def test_late_copies_arrive_whole(late: list[LateStream], direct: bool) -> None:
    torch.manual_seed(SEED)
    size, count = 37, 9
    lane = Lane(torch.device("cuda", 0), size)
    lane.enter()
    sent = torch.randint(0, 256, (count, size), dtype=torch.uint8)
    arrived = torch.zeros_like(sent)
    befores = [object(), object()]
    for number, row in enumerate(sent):
        used = size - number

        def read(buffer: memoryview, row: torch.Tensor = row, used: int = used) -> int:
            buffer[:used] = row.numpy().data[:used]
            return used

        assert lane.fill(read) == used
        copy = arrived[number, :used].copy_
        lane.send(used, arrived[number, :used] if direct else None, copy, befores[number // 4 % 2])  # type: ignore[arg-type]
    lane.finish()
    for number in range(count):
        assert torch.equal(arrived[number, : size - number], sent[number, : size - number])
    assert late[0].waited == [befores[0], befores[1], befores[0]]
