"""Readers that never read: what waits for them is bounded, in memory and in time."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import Any

from tests.server.fault_tools import Proof, completion, connect, done, events, read, resident_mb, tokens_of, until
from tests.server.server_process import started

READERS, TOKENS = 16, 100
NAME = "n" * 100_000
"""Is in every event: a single one is more than is written without waiting."""
MOST_MB = 40
"""They would be READERS / 2 * TOKENS * len(NAME), 80 MB, if every event was kept."""
PROMPT = [1, 2, 3]
KINDS: list[dict[str, Any]] = [
    {"prompt": PROMPT, "max_tokens": TOKENS, "stream": True},
    {"prompt": [[299] * 4000] * 20, "max_tokens": 1},  # 320 kB of ids come back at once
]


def test_readers_that_never_read_are_cut() -> None:
    flags = ["send_buffer=4096", "STALLED_S=3", "--served-model-name", NAME]
    with started("tests.server.serve_fake", ["ok", "0", *flags]) as server, ExitStack() as stack:
        server.wait_until_ready()
        proof = Proof(server)
        clients = [stack.enter_context(closing(connect(server.url, 4096))) for _ in range(READERS)]
        for number, client in enumerate(clients):
            client.sendall(completion(**KINDS[number % 2]))
        with closing(connect(server.url)) as reads:
            reads.sendall(completion(**KINDS[0]))
            assert tokens_of(events(read(reads, done))) == [PROMPT[at % 3] for at in range(TOKENS)]
        memory: list[float] = []

        def all_are_cut() -> bool:
            memory.append(resident_mb(server.process.pid))
            return sum("took nothing for 3 s" in line for line in server.log) == READERS

        until(all_are_cut)
        assert max(memory) < proof.resident_mb + MOST_MB
        for client in clients:
            assert not done(read(client))
        proof.check()
        assert server.terminate() == 0, server.log
