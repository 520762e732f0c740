"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class StopMatch(NamedTuple):
    """The stop string that ended a text, and where its text is cut, counted from the start of the last piece; before
    it, where the stop string began earlier."""

    stop: str
    cut: int


@dataclass(slots=True)
class _Pattern:
    """One stop string, and how much of it the text ends with (Knuth, Morris, Pratt, SIAM J. Comput. 6, 1977)."""

    text: str
    fallback: list[int]
    matched: int = 0

    def advance(self, piece: str, ignored: bool) -> int | None:
        """Take in a piece. Returns how many of its characters complete the first occurrence; None for none. Occurrences
        that are `ignored` are passed over."""
        text, fallback, matched = self.text, self.fallback, self.matched
        if not matched and text[0] not in piece:
            return None
        for count, char in enumerate(piece, start=1):
            while matched and char != text[matched]:
                matched = fallback[matched]
            if char == text[matched]:
                matched += 1
                if matched == len(text):
                    if not ignored:
                        return count
                    matched = fallback[matched]
        self.matched = matched
        return None


class StopMatcher:
    """Looks for stop strings, and says how much of the text's end could still become one.

    The occurrence that is complete first wins; of several complete at the same character, the first in the list of stop
    strings. So the result does not depend on how the text was cut into pieces. Constant time per character and stop
    string.
    """

    def __init__(self, stops: list[str], include: bool) -> None:
        """include: the text is cut after the stop string, and nothing is held back for it."""
        self._patterns = [_Pattern(stop, _fallbacks(stop)) for stop in stops]
        self._include = include

    def push(self, piece: str, ignored: bool = False) -> StopMatch | None:
        """Take in the next piece. `ignored`: stop strings complete in this piece do not count (min_tokens)."""
        found: tuple[int, str] | None = None
        for pattern in self._patterns:
            count = pattern.advance(piece, ignored)
            if count is not None and (found is None or count < found[0]):
                found = count, pattern.text
        if found is None:
            return None
        count, stop = found
        return StopMatch(stop, count if self._include else count - len(stop))

    @property
    def held(self) -> int:
        """Characters at the end of the text that may not be shown yet."""
        if self._include or not self._patterns:
            return 0
        return max(pattern.matched for pattern in self._patterns)


def _fallbacks(text: str) -> list[int]:
    """For each length, the longest shorter prefix that the prefix of that length ends with."""
    fallbacks = [0, 0]
    for at in range(1, len(text)):
        matched = fallbacks[at]
        while matched and text[at] != text[matched]:
            matched = fallbacks[matched]
        fallbacks.append(matched + 1 if text[at] == text[matched] else 0)
    return fallbacks
