from __future__ import annotations

import itertools

import pytest

from tokenspeed.contracts.lifecycle import Status, check_transition

ALLOWED = {
    "WAITING": "WAITING_REMOTE LOADING RUNNING FINISHED",
    "WAITING_REMOTE": "LOADING FINISHED",
    "LOADING": "RUNNING FINISHED",
    "RUNNING": "PREEMPTED FINISHED",
    "PREEMPTED": "WAITING FINISHED",
    "FINISHED": "",
}


@pytest.mark.parametrize("old, new", list(itertools.product(Status, Status)))
def test_only_these_transitions_are_allowed(old, new):
    if new.name in ALLOWED[old.name].split():
        check_transition(old, new)
    else:
        with pytest.raises(RuntimeError, match=f"from {old.name} to {new.name}"):
            check_transition(old, new)
