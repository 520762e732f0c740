"""The host's side of the mailbox: headers of steps go out, tokens are looked for until they are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from tokenspeed.contracts.errors import DeviceError
from tokenspeed.kernels.triton.mailbox import HEAD, ROW_FIELDS, Mailbox, header_words, write_header

SLOTS = 4
"""Steps that have a place of their own; a power of two, and more than are under way."""
SPIN_S, NAP_S = 0.002, 50e-6
"""How long the host looks without a pause, and its pauses then: a nap is some 50 us longer than asked for."""
NOTHING = np.empty(0, np.int32)


class SharedMemory(Protocol):
    """What a ring needs of a device."""

    def pinned(self, *shape: int) -> torch.Tensor:
        """Host memory, int32 zeros, that kernels can read and write."""
        ...

    def mark(self) -> Callable[[], None]:
        """A point in the work given so far; calling it waits until that is done. Raises what the device raised."""
        ...

    def idle(self) -> bool:
        """Whether all work given so far is done, seen without waiting. Raises what the device raised."""
        ...


class StepRing:
    """Steps have numbers that ascend by one, in the order of their launch. Not for several threads."""

    def __init__(self, link: SharedMemory, rows: int, pairs: int, device: torch.device) -> None:
        """For steps of at most `rows` rows, and `pairs` words of state changed."""
        self._link = link
        headers, results = link.pinned(SLOTS, header_words(rows, pairs)), link.pinned(SLOTS, 2 * rows)
        self.mailbox = Mailbox.over(headers, results.view(torch.int64), device)
        self._headers: np.ndarray = headers.numpy()
        self._results: np.ndarray = results.numpy().view(np.int64)
        self._number = self._answered = 0
        self._lost = False

    def post(self, rows: Sequence[tuple[int, int, int, int]], indices: np.ndarray, values: np.ndarray) -> int:
        """Write the header of the next step (see `mailbox`), which must be launched now. Returns its number."""
        if self._lost:
            self._find()
        if self._number + 1 - SLOTS > self._answered:
            self.wait(self._number + 1 - SLOTS, 1)  # the device may not have read that one's header yet
        write_header(self._headers[(self._number + 1) % SLOTS], rows, indices, values)
        self._number += 1
        return self._number

    def wait(self, number: int, rows: int) -> list[int]:
        """The tokens of a step's rows, -1 where none was drawn. To be asked before `SLOTS` more steps are posted.

        Raises DeviceError where the device has no work left and did not answer, and what the device raised.
        """
        found = self._look(number, rows)
        if found is None:
            found = self._spin(number, rows)
        while found is None:
            idle = self._link.idle()
            found = self._look(number, rows)
            if found is None and idle:
                raise DeviceError(f"the device has no work left and step {number} has no result")
            if found is None:
                time.sleep(NAP_S)
        self._answered = max(self._answered, number)
        return found

    def lose(self) -> None:
        """A launch was broken off: whether the device took part of it, or counted it, is not known."""
        self._lost = True

    def repeat(self, reserved: Sequence[int]) -> None:
        """Make further steps those of the last one, whose rows have so many positions with pages, when they are
        launched without `post`; each needs a `skip`. No step may be under way."""
        last = self._headers[self._number % SLOTS]
        last[HEAD + ROW_FIELDS - 1 : header_words(len(reserved), 0) : ROW_FIELDS] = reserved
        self._headers[:] = last.copy()

    def skip(self) -> None:
        """A step is launched as it was repeated."""
        self._number += 1

    def _look(self, number: int, rows: int) -> list[int] | None:
        """Tokens where all rows have the step's number. Words are copied first: number and token of one moment."""
        words = self._results[number % SLOTS, : max(rows, 1)].copy()
        if (words >> 32 != _word(number)).any():
            return None
        tokens: list[int] = words.astype(np.int32)[:rows].tolist()
        return tokens

    def _spin(self, number: int, rows: int) -> list[int] | None:
        until = time.perf_counter() + SPIN_S
        while time.perf_counter() < until:
            time.sleep(0)  # other threads may run
            if (found := self._look(number, rows)) is not None:
                return found
        return None

    def _find(self) -> None:
        """Go on from a known state after a launch that was broken off."""
        self._link.mark()()
        self.mailbox.turn.fill_(_word(self._number))
        self._answered = self._number
        self._lost = False


def _word(number: int) -> int:
    """As the device counts, int32."""
    return (number + 2**31) % 2**32 - 2**31
