"""Servers as processes of their own."""

from __future__ import annotations

import os
import signal
import sys
import urllib.request
from pathlib import Path

import pytest

from tokenspeed.bench.running_server import free_port, our_command, serving
from tokenspeed.contracts.errors import ConfigError

CODE = """
import http.server, sys, time
asked = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        self.send_response(503 if self.path == "/health" and asked < 3 else 200)
        self.end_headers()
        self.wfile.write(b"%d" % asked)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def test_it_is_there_when_it_is_well_and_gone_afterwards() -> None:
    port = free_port()
    with serving(python(CODE, str(port)), port) as server:
        with urllib.request.urlopen(f"{server.url}/x", timeout=30) as response:
            assert int(response.read()) == 4
        os.kill(server.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_what_cannot_be_started() -> None:
    with pytest.raises(ConfigError, match="no-such-program cannot be run"), serving(["/no-such-program"], 1):
        pass
    code = "import sys; sys.exit('a wheel came off')"
    with pytest.raises(ConfigError, match="ended with status 1: a wheel came off"), serving(python(code), free_port()):
        pass


def test_one_that_ends_before_its_time() -> None:
    port = free_port()

    def serve() -> None:
        with serving(python(CODE, str(port)), port) as server:
            os.kill(server.pid, signal.SIGKILL)
            os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)

    with pytest.raises(ConfigError, match="has ended with status -9"):
        serve()


def test_our_own() -> None:
    command = our_command(123, Path("a/model.gguf"), "--threads", "2")
    assert command[0] == sys.executable
    assert " ".join(command[1:]) == "-m tokenspeed.cli.main serve a/model.gguf --port 123 --threads 2"
