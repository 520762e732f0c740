"""Lists of choices by expert, in the interpreter, against loops over ids."""

from __future__ import annotations

import random

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.kernels.triton import expert_lists as module
from tokenspeed.kernels.triton.expert_lists import ExpertLists, expert_lists, most_blocks


def random_ids(tokens: int, experts: int, k: int, rng: random.Random) -> torch.Tensor:
    """Distinct ids of each token, some experts far more often than others, and some tokens of padding."""
    weights = torch.tensor([rng.choice((0.01, 0.1, 1.0)) for _ in range(experts)]).expand(tokens, -1)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    ids = torch.multinomial(weights, k, generator=generator).int()
    ids[[t for t in range(tokens) if rng.random() < 0.2]] = -1
    return ids


def check(ids: torch.Tensor, experts: int, rows: int, lists: ExpertLists) -> None:
    flat, at = ids.flatten().tolist(), 0
    wanted: list[list[int]] = []
    order: list[int] = []
    for expert in range(experts):
        mine = [i for i, found in enumerate(flat) if found == expert]
        cuts = range(0, len(mine), rows)
        wanted += [[expert, at + cut, min(rows, len(mine) - cut)] for cut in cuts]
        order += mine
        at += len(mine)
    blocks = lists.blocks.tolist()
    assert lists.order[: len(order)].tolist() == order
    assert [block[:3] for block in blocks[: len(wanted)]] == wanted
    assert all(block[0] == -1 for block in blocks[len(wanted) :])


@pytest.mark.parametrize(
    "tokens, experts, k, rows", [(1, 128, 8, 16), (7, 37, 5, 16), (90, 8, 2, 32), (3, 3, 3, 1), (40, 128, 8, 16)]
)
def test_lists(tokens: int, experts: int, k: int, rows: int) -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    ids = random_ids(tokens, experts, k, rng)
    check(ids, experts, rows, expert_lists(ids, experts, rows))


@pytest.mark.parametrize("chunk", [32, 64])
def test_lists_of_several_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    ids = random_ids(241, 5, 3, random.Random(SEED))
    check(ids, 5, 4, expert_lists(ids, 5, 4))


def test_nobody_chosen() -> None:
    lists = expert_lists(torch.full((3, 2), -1, dtype=torch.int32), 4, 16)
    assert (lists.blocks[:, 0] == -1).all()


@pytest.mark.parametrize("seed", [SEED])
def test_blocks_are_never_more_than_there_is_room_for(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        experts, rows = rng.randint(1, 40), rng.choice((1, 2, 16))
        counts = [rng.choice((0, 1, rng.randint(0, 70))) for _ in range(experts)]
        choices = sum(counts)
        assert sum(-(-count // rows) for count in counts) <= most_blocks(choices, experts, rows)
    assert most_blocks(8, 128, 16) == 8
    assert most_blocks(33, 1, 16) == 3
