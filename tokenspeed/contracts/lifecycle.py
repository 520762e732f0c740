"""The states of a sequence and the ways between them."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """WAITING_REMOTE: its KV is computed elsewhere. LOADING: its KV is on the way into its pages. PREEMPTED: it loses
    its pages to another, and waits again as soon as the steps that still name it have retired."""

    WAITING = 0
    WAITING_REMOTE = 1
    LOADING = 2
    RUNNING = 3
    PREEMPTED = 4
    FINISHED = 5


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.WAITING_REMOTE, Status.LOADING, Status.RUNNING, Status.FINISHED}),
    Status.WAITING_REMOTE: frozenset({Status.LOADING, Status.FINISHED}),
    Status.LOADING: frozenset({Status.RUNNING, Status.FINISHED}),
    Status.RUNNING: frozenset({Status.PREEMPTED, Status.FINISHED}),
    Status.PREEMPTED: frozenset({Status.WAITING, Status.FINISHED}),
    Status.FINISHED: frozenset(),
}


def check_transition(old: Status, new: Status) -> None:
    """Raise RuntimeError unless a sequence may go from `old` to `new`."""
    if new not in TRANSITIONS[old]:
        raise RuntimeError(f"a sequence cannot go from {old.name} to {new.name}")
