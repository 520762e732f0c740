"""Which chat format a tokenizer's model was trained on, where it is one that we read ourselves."""

from __future__ import annotations

from collections.abc import Callable

from tokenspeed.parsing.harmony import harmony_of
from tokenspeed.parsing.reply import ReplyFormat
from tokenspeed.tokenizer.base import Tokenizer

FORMATS: tuple[Callable[[Tokenizer], ReplyFormat | None], ...] = (harmony_of,)
"""Each looks for its own special tokens."""


def reply_format(tokenizer: Tokenizer) -> ReplyFormat | None:
    """The first that knows the tokenizer."""
    return next((found for find in FORMATS if (found := find(tokenizer)) is not None), None)
