"""Stop strings against a search in the whole text."""

from __future__ import annotations

import random
import time

import pytest

from tests.seeds import SEED
from tokenspeed.engine.stop import StopMatcher


def whole_text_search(text: str, stops: list[str], after: int) -> tuple[int, str] | None:
    """Where the first stop string is complete that is so past `after` characters; the first in the list of equals."""
    for end in range(after + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end, stop
    return None


def could_begin(text: str, stops: list[str]) -> int:
    """The longest end of the text that a stop string begins with, without being all of it."""
    return max(n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]))


def pieces_of(rng: random.Random, text: str) -> list[str]:
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(len(text) + 1)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("seed", [SEED])
def test_any_cutting_equals_a_search_in_the_whole(include: bool, seed: int) -> None:
    rng = random.Random(seed)
    found_some = 0
    for _ in range(1500):
        text = "".join(rng.choices("aab\u20ac", k=rng.randrange(1, 30)))
        stops = list({"".join(rng.choices("aab\u20ac", k=rng.randrange(1, 7))) for _ in range(rng.randrange(1, 4))})
        pieces = pieces_of(rng, text)
        ignored = rng.randrange(len(pieces) + 1) if rng.random() < 0.5 else 0
        expected = whole_text_search(text, stops, sum(map(len, pieces[:ignored])))
        matcher, seen = StopMatcher(stops, include), ""
        match = None
        for number, piece in enumerate(pieces):
            match = matcher.push(piece, ignored=number < ignored)
            if match is not None:
                break
            seen += piece
            held = 0 if include else could_begin(seen, stops)
            assert matcher.held == held, (text, stops, pieces)
        if match is None:
            assert expected is None, (text, stops, pieces)
            continue
        found_some += 1
        assert expected is not None
        end, stop = expected
        assert (len(seen) + match.cut, match.stop) == (end if include else end - len(stop), stop), (text, stops, pieces)
    assert found_some > 300


def test_first_complete_wins_and_the_list_decides_between_equals() -> None:
    push = StopMatcher(["world", "lo w", "o"], include=False).push
    assert push("hello world") == ("o", 4)
    assert StopMatcher(["bc", "abc"], include=False).push("xabcx") == ("bc", 2)
    assert StopMatcher(["abc", "bc"], include=False).push("xabcx") == ("abc", 1)


def test_cost_does_not_grow_with_the_text_or_a_hostile_stop_string() -> None:
    """A quadratic matcher needs minutes for this."""
    matcher = StopMatcher(["a" * 5000 + "b"], include=False)
    started = time.process_time()
    for _ in range(30_000):
        assert matcher.push("aaaa") is None
    assert matcher.held == 5000
    assert time.process_time() - started < 5
