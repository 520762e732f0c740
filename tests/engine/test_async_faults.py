"""An engine process that dies, hangs, raises or does not start; and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import cast

import pytest

from tests.engine.async_tools import ROOT, alive, command, deltas, fake_engine, importable, read, run, until
from tests.engine.fake_core import FATAL, said
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import EngineDeadError, ModelNotFoundError
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.engine.loop import FAILED
from tokenspeed.engine.messages import ErrorInfo, Failed
from tokenspeed.engine.process import EngineProcess

__all__ = ["importable"]
FOREVER = 10**6
PARENT = """
import asyncio, sys, time
from tests.engine.async_tools import command
from tokenspeed.config.engine import EngineConfig
from tokenspeed.engine.async_engine import AsyncEngine

async def main():
    engine = await AsyncEngine.start(EngineConfig(), core_command=command("ok"))
    print(engine.pid, flush=True)
    time.sleep(600)

asyncio.run(main())
"""


def test_a_killed_engine_fails_its_streams_within_three_seconds() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            assert engine.pid is not None
            streams = [engine.submit([number, 2], deltas(FOREVER)) for number in range(1, 9)]
            for stream in streams:
                await anext(stream)
            os.kill(engine.pid, signal.SIGKILL)
            async with asyncio.timeout(3):
                for stream in streams:
                    with pytest.raises(EngineDeadError, match=r"killed by signal 9 \(SIGKILL\)"):
                        await read(stream)
            health = engine.health()
            assert not health.ok
            assert "SIGKILL" in health.reason
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                engine.submit([1], deltas())
            assert not alive(engine.pid)
            assert await engine.drain(timeout=1) == 0

    run(main())


def test_what_came_before_the_end_is_still_read() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            assert engine.pid is not None
            stream = engine.submit([1, 2, 3], deltas(FOREVER))
            await until(lambda: len(stream.output.outputs[0].token_ids) >= 5)
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: not engine.health().ok)
            ids = (await anext(stream)).outputs[0].token_ids
            assert ids == stream.output.outputs[0].token_ids == said([1, 2, 3], 0, len(ids))
            assert len(ids) >= 5
            for _ in range(2):
                with pytest.raises(EngineDeadError, match="SIGKILL"):
                    await anext(stream)

    run(main())


def test_news_of_the_end_may_overtake_its_reason() -> None:
    class Ended:
        async def wait(self) -> int:
            return FAILED

    async def main() -> None:
        engine = AsyncEngine(EngineConfig(), None, 1.0)
        watching = asyncio.create_task(engine._watch_process(cast(EngineProcess, Ended())))
        await asyncio.sleep(0.02)
        engine._receive(Failed(ErrorInfo.of(ModelNotFoundError("no model there"))))
        await watching
        with pytest.raises(ModelNotFoundError, match="no model there"):
            await engine._ready
        await engine.close()

    run(main())


def test_an_engine_that_exits_says_its_status() -> None:
    async def main() -> None:
        async with fake_engine("exit") as engine:
            with pytest.raises(EngineDeadError, match="ended with status 7"):
                await read(engine.submit([FATAL], deltas()))

    run(main())


def test_a_step_that_raises_fails_all_and_is_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with fake_engine("raise", step_s=0.001) as engine:
            assert engine.pid is not None
            bystander = engine.submit([1, 2], deltas(FOREVER))
            await anext(bystander)
            fatal = engine.submit([FATAL], deltas())
            for stream in (fatal, bystander):
                with pytest.raises(EngineDeadError, match="the engine failed: RuntimeError: the bolt broke"):
                    await read(stream)
            assert "the bolt broke" in engine.health().reason
            pid = engine.pid
            await until(lambda: not alive(pid))

    run(main())
    log = capfd.readouterr().err
    assert "Traceback" in log
    assert "in _go_wrong" in log


def test_a_stuck_step_is_unhealthy_and_shows_its_stacks(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with fake_engine("hang", stuck_after_s=1.5) as engine:
            assert engine.pid is not None
            await read(engine.submit([1], deltas(3)))
            stream = engine.submit([FATAL], deltas())
            await until(lambda: not engine.health().ok)
            assert "stuck" in engine.health().reason
            assert "1 requests wait" in engine.health().reason
            log = ""
            while "in _go_wrong" not in log:
                log += capfd.readouterr().err
                await asyncio.sleep(0.01)
            # The abort cannot reach it; it stays unhealthy as long as it does not answer.
            stream.abort()
            assert not engine.health().ok
            await engine.close(timeout=600)  # nothing to wait for
            assert not alive(engine.pid)

    run(main())
    assert [record.levelname for record in caplog.records if "stuck" in record.message] == ["ERROR"]


def test_an_engine_that_turns_round_without_a_step_is_stuck() -> None:
    async def main() -> None:
        async with fake_engine("livelock", step_s=0.01, stuck_after_s=0.7) as engine:
            engine.submit([1], deltas(1))
            stream = engine.submit([FATAL], deltas())
            await until(lambda: not engine.health().ok)
            assert "stuck" in engine.health().reason
            # Its loop still answers: an abort makes it idle, and well.
            stream.abort()
            await until(lambda: engine.health() == (True, "idle"))

    run(main())


def test_a_loop_that_was_busy_itself_does_not_blame_the_engine() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001, stuck_after_s=0.5) as engine:
            stream = engine.submit([1, 2], deltas(FOREVER))
            await anext(stream)
            time.sleep(1.0)
            assert engine.health() == (True, "running")

    run(main())


def test_signals_to_the_engine_are_left_to_its_parent() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            assert engine.pid is not None
            stream = engine.submit([1, 2], deltas(100))
            await anext(stream)
            os.kill(engine.pid, signal.SIGINT)
            os.kill(engine.pid, signal.SIGTERM)
            await read(stream)
            assert stream.output.outputs[0].token_ids == said([1, 2], 0, 100)
            assert os.getpgid(engine.pid) != os.getpgid(0)

    run(main())


@pytest.mark.parametrize(
    "mode, error, text",
    [
        ("no-model", ModelNotFoundError, r"^no model at nowhere$"),
        ("build-error", EngineDeadError, "the engine failed: ZeroDivisionError: a wheel came off"),
    ],
)
def test_a_start_that_fails(capfd: pytest.CaptureFixture[str], mode: str, error: type[Exception], text: str) -> None:
    async def main() -> None:
        with pytest.raises(error, match=text):
            await AsyncEngine.start(EngineConfig(model="nowhere"), core_command=command(mode))

    run(main())
    # A user's mistake is one line, told by who asked; a bug has its traceback.
    assert ("Traceback" in capfd.readouterr().err) == (mode == "build-error")


def test_a_process_that_never_connects() -> None:
    async def main() -> None:
        with pytest.raises(EngineDeadError, match="ended with status 5"):
            await AsyncEngine.start(EngineConfig(), core_command=[sys.executable, "-c", "raise SystemExit(5)"])

    run(main())


def test_a_cancelled_start_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    note = tmp_path_factory.mktemp("pid") / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(600)"

    async def main() -> None:
        starting = asyncio.create_task(AsyncEngine.start(EngineConfig(), core_command=[sys.executable, "-c", code]))
        await until(lambda: note.exists() and note.read_text() != "")
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    run(main())
    assert not alive(int(note.read_text()))


def open_sockets() -> int:
    """How many this process has open."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            count += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
    return count


def test_the_socket_goes_with_the_engine() -> None:
    async def main() -> None:
        before = open_sockets()
        async with fake_engine():
            assert open_sockets() > before
        assert open_sockets() == before

    run(main())


def test_an_engine_that_does_not_stop_is_killed() -> None:
    async def main() -> None:
        async with fake_engine("slow-close") as engine:
            assert engine.pid is not None
            await engine.close(timeout=0.1)
            assert not alive(engine.pid)

    run(main())


def test_an_engine_ends_with_its_parent() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    # The engine holds the other end of this pipe, too: reading ends when both are gone.
    assert parent.communicate(timeout=20)[0] == ""
