"""The least that a process on this machine needs to pass a token on: it wakes for a message on one socket and writes an
event to another. `relay_cpu_us` is the floor under a server's own time per token."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time

MESSAGE = bytes(48)
EVENT = bytes(200)
"""As long as those of one stream."""


def relay_cpu_us(step_ms: float, count: int) -> float:
    """Processor microseconds of the relaying process per event, at one event per `step_ms`."""
    engine, engine_end = socket.socketpair()
    listening = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listening.getsockname())
    served, _ = listening.accept()
    served.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    relaying = _process("relay", engine_end, served)
    ticking = _process("tick", engine, step_ms, count)
    with relaying as relay, ticking:
        for end in (engine, engine_end, served, listening):
            end.close()
        while client.recv(1 << 16):
            pass
        assert relay.stdout is not None
        total_ns = int(relay.stdout.readline())
    client.close()
    return total_ns / 1e3 / count


def _process(job: str, *arguments: socket.socket | float) -> subprocess.Popen[str]:
    sockets = [each.fileno() for each in arguments if isinstance(each, socket.socket)]
    shown = [str(each.fileno() if isinstance(each, socket.socket) else each) for each in arguments]
    command = [sys.executable, "-m", "tokenspeed.bench.relay", job, *shown]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=sockets)


def _relay(source_fd: int, target_fd: int) -> None:
    source, target = socket.socket(fileno=source_fd), socket.socket(fileno=target_fd)
    poller = select.epoll()
    poller.register(source, select.EPOLLIN)
    began = time.process_time_ns()
    while True:
        poller.poll()
        if not source.recv(1 << 12):
            break
        target.send(EVENT)
    print(time.process_time_ns() - began, flush=True)


def _tick(target_fd: int, step_ms: float, count: int) -> None:
    target = socket.socket(fileno=target_fd)
    for _ in range(count):
        time.sleep(step_ms / 1e3)
        target.send(MESSAGE)


if __name__ == "__main__":
    if sys.argv[1] == "relay":
        _relay(int(sys.argv[2]), int(sys.argv[3]))
    else:
        _tick(int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
