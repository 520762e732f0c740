"""Work on weights, shared out to threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def run_tasks(tasks: Sequence[Callable[[], int]]) -> Iterator[int]:
    """Run every task; what each returns, as it ends.

    Each task runs on one thread. Torch's own threads would meet at a barrier thousands of times, and one busy
    neighbour on a core then holds up every one of them.
    """
    before = torch.get_num_threads()
    workers = max(1, min(usable_cores(), len(tasks)))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for future in as_completed([pool.submit(task) for task in tasks]):
                yield future.result()
    finally:
        # A worker's setting is also the default of threads started later.
        torch.set_num_threads(before)
