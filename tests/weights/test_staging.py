"""A lane's buffer is not written to while a copy from it may be under way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.contracts.errors import DeviceError
from tokenspeed.weights import staging
from tokenspeed.weights.driver_calls import DriverCalls, driver_calls
from tokenspeed.weights.staging import Lane, Target

SIZE, COUNT = 37, 9
CONTEXT, HANDLE = 77, 5


class LateStream:
    """Work is done as late as it may be: when somebody waits for it."""

    cuda_stream = HANDLE

    def __init__(self, device: torch.device | None = None) -> None:
        self.work: list[Callable[[], object]] = []
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def synchronize(self) -> None:
        self.run(len(self.work))

    def run(self, count: int) -> None:
        for number in range(count):
            self.work[number]()
            self.work[number] = lambda: None


class LateEvent:
    def __init__(self) -> None:
        self.count = -1
        self.cuda_event = id(self)

    def record(self, stream: LateStream) -> None:
        self.stream, self.count = stream, len(stream.work)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.stream.run(self.count)


class Library:
    """libcuda, of which one call may fail."""

    def __init__(self, stream: LateStream, fails: str = "", context: int = CONTEXT) -> None:
        self.stream, self.current = stream, 0

        def call(name: str, work: Callable[..., object]) -> Any:
            def called(*given: Any) -> int:
                work(*given)
                return 700 if name == fails else 0

            return called

        def give(pointer: Any) -> None:
            pointer._obj.value = context

        def take(handle: Any) -> None:
            self.current = handle.value

        def copy(to: int, source: int, nbytes: int, handle: int) -> None:
            assert handle == HANDLE
            stream.work.append(lambda: ctypes.memmove(to, source, nbytes))

        def wait(handle: int, event: int, flags: int) -> None:
            assert (handle, flags) == (HANDLE, 0)
            stream.waited.append(event)

        self.cuCtxGetCurrent = call("cuCtxGetCurrent", give)
        self.cuCtxSetCurrent = call("cuCtxSetCurrent", take)
        self.cuMemcpyHtoDAsync_v2 = call("cuMemcpyHtoDAsync", copy)
        self.cuStreamWaitEvent = call("cuStreamWaitEvent", wait)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateStream:
    stream = LateStream()
    cuda = SimpleNamespace(Stream=lambda device: stream, Event=LateEvent, set_stream=lambda stream: None)
    fake = SimpleNamespace(cuda=cuda, uint8=torch.uint8, empty=lambda n, **_: torch.zeros(n, dtype=torch.uint8))
    monkeypatch.setattr(staging, "torch", fake)
    monkeypatch.setattr(staging, "_copy", lambda host, to: stream.work.append(lambda: to.copy_(host)))
    return stream


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("by_driver", [True, False])
def test_late_copies_arrive_whole(late: LateStream, by_driver: bool, direct: bool) -> None:
    torch.manual_seed(SEED)
    library = Library(late)
    lane = Lane(torch.device("cuda", 0), SIZE, DriverCalls(library) if by_driver else None)
    lane.follow(late)  # type: ignore[arg-type]
    assert late.waited == [], "nothing was sent"
    lane.enter()
    assert library.current == (CONTEXT if by_driver else 0)
    sent = torch.randint(0, 256, (COUNT, SIZE), dtype=torch.uint8)
    arrived = torch.zeros_like(sent)
    target = Target(arrived.view(-1), arrived.data_ptr())
    befores: list[Any] = [LateEvent(), LateEvent()]
    for number, row in enumerate(sent):
        used = SIZE - number

        def read(buffer: memoryview, row: torch.Tensor = row, used: int = used) -> int:
            buffer[:used] = row.numpy().data[:used]
            return used

        def work(room: torch.Tensor, to: torch.Tensor = arrived[number]) -> None:
            late.work.append(lambda: to[: len(room)].copy_(room))

        assert lane.fill(read) == used
        if direct:
            lane.send(used, target, number * SIZE, befores[number // 4 % 2])
        else:
            lane.use(used, work, befores[number // 4 % 2])
    lane.follow(late)  # type: ignore[arg-type]
    assert isinstance(lane.last, LateEvent)
    expected: list[Any] = [befores[0], befores[1], befores[0], lane.last]
    assert late.waited == ([event.cuda_event for event in expected] if by_driver else expected)
    assert lane.last.count == len(late.work)
    lane.finish()
    for number in range(COUNT):
        assert torch.equal(arrived[number, : SIZE - number], sent[number, : SIZE - number])


def all_calls(library: Library) -> None:
    calls = DriverCalls(library)
    calls.enter()
    calls.copy(0, 0, 0, HANDLE)
    calls.wait(HANDLE, 0)


@pytest.mark.parametrize("call", ["cuCtxGetCurrent", "cuCtxSetCurrent", "cuMemcpyHtoDAsync", "cuStreamWaitEvent"])
def test_failing_calls_are_named(call: str) -> None:
    all_calls(Library(LateStream()))
    with pytest.raises(DeviceError, match=f"{call} failed with CUDA error 700"):
        all_calls(Library(LateStream(), fails=call))


def test_without_a_context_or_a_device() -> None:
    with pytest.raises(DeviceError, match="no context"):
        DriverCalls(Library(LateStream(), context=0))
    assert driver_calls(torch.device("cpu")) is None
