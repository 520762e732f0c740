from __future__ import annotations

import random

import pytest

from tests.seeds import SEED
from tokenspeed.cache.table import BlockTable
from tokenspeed.contracts.request import Request
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.scheduler.queue import AGING_STEPS, OrderedSequences, order_of
from tokenspeed.scheduler.sequence import LiveRequest, Order, Sequence


def make(order: Order) -> Sequence:
    request = Request(request_id=str(order), prompt_token_ids=[1], params=SamplingParams(), seed=0)
    return Sequence(LiveRequest(request, 2), 0, order, [1], BlockTable(None, [], []))


def test_order_is_priority_then_arrival_and_aging_moves_it():
    assert order_of(0, 5, 7, 0) < order_of(0, 5, 8, 0) < order_of(0, 6, 1, 0)
    assert order_of(0, 5, 7, 0) < order_of(0, 5, 7, 1)
    assert order_of(-1, 5, 2, 0) < order_of(0, 5, 1, 0)
    assert order_of(1, 0, 1, 0) < order_of(0, AGING_STEPS + 1, 2, 0)
    assert order_of(1, 0, 1, 0) > order_of(0, AGING_STEPS - 1, 2, 0)


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_it_stays_sorted(seed):
    rng, queue = random.Random(seed), OrderedSequences()
    there: list[Sequence] = []
    for number in range(300):
        if there and rng.random() < 0.4:
            gone = there.pop(rng.randrange(len(there)))
            queue.remove(gone)
            assert gone not in queue
            with pytest.raises(RuntimeError, match="not queued"):
                queue.remove(gone)
        else:
            there.append(make(order_of(rng.randint(-2, 2), rng.randrange(3000), number, 0)))
            queue.add(there[-1])
        expected = sorted(there, key=lambda sequence: sequence.order)
        assert list(queue) == expected
        assert len(queue) == len(expected)
        if expected:
            assert (queue.first, queue.last) == (expected[0], expected[-1])
