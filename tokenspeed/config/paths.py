"""Where this user's files lie, and how one is written so that nobody sees it half done."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def user_cache() -> Path:
    """$XDG_CACHE_HOME/tokenspeed, or ~/.cache/tokenspeed."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path here is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "tokenspeed"


@contextlib.contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """An empty file of its own beside `target`, to be written and renamed to it; removed if it is still there."""
    handle, name = tempfile.mkstemp(prefix=target.name + ".", suffix=".partial", dir=target.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
