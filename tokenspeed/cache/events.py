"""What a cache tells those who keep a map of it: routers, other tiers."""

from __future__ import annotations

from typing import Protocol


class CacheListener(Protocol):
    """Called as it happens, in order. Must not call back into the cache."""

    def on_stored(self, key: bytes, parent: bytes, token_ids: list[int], group: int) -> None:
        """A page can be hit from now on. `parent`: the key of the page before it, the root for the first."""
        ...

    def on_removed(self, key: bytes, group: int) -> None:
        """A page can no longer be hit."""
        ...
