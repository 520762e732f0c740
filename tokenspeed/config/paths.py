"""Where this user's files lie."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """$XDG_CACHE_HOME/tokenspeed, or ~/.cache/tokenspeed."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path here is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "tokenspeed"
