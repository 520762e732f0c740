"""`tokenspeed serve` whose engine process is tests/engine/fake_core.py: MODE STEP_SECONDS [NAME=VALUE ...] [FLAGS].

MODE real leaves the engine as it is. NAME is a bound of server/connection.py, or send_buffer: bytes that the system
keeps for a client, or first_delay_s: seconds before the first restart. Ends with status 70 if the serving process has
imported torch.
"""

from __future__ import annotations

import socket
import sys
from functools import partial

from tokenspeed.cli.main import main
from tokenspeed.engine import process
from tokenspeed.server import connection, outage
from tokenspeed.server import run as server_run


def change(name: str, value: float) -> None:
    """Set a bound."""
    if name == "first_delay_s":
        server_run.RestartPolicy = partial(outage.RestartPolicy, first_delay_s=value)  # type: ignore[assignment, attr-defined]
        return
    if name != "send_buffer":
        assert hasattr(connection, name), name
        setattr(connection, name, value)
        return
    listen = server_run.listen

    def with_buffer(host: str, port: int) -> socket.socket:
        made = listen(host, port)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, int(value))
        return made

    server_run.listen = with_buffer


if __name__ == "__main__":
    mode, step_s, *rest = sys.argv[1:]
    bounds = [each for each in rest if "=" in each and not each.startswith("-")]
    for name, _, value in (each.partition("=") for each in bounds):
        change(name, float(value))
    if mode != "real":
        process.CORE_COMMAND = (sys.executable, "-m", "tests.engine.fake_core", mode, step_s)  # type: ignore[assignment]
    status = main(["serve", "--port", "0", *(each for each in rest if each not in bounds)])
    sys.exit(70 if "torch" in sys.modules else status)
