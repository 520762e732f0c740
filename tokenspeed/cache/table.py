"""Block tables, and what the prefix cache found for one."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenspeed.cache.keys import ChainHasher


@dataclass(slots=True)
class BlockTable:
    """The pages of one sequence: a column per group, all of the same length; entry i is of positions i * page_size on.
    -1 is a page outside the group's window. Made by `CacheManager.open` and `fork`, changed by the manager only.
    """

    hasher: ChainHasher | None
    """None without prefix caching."""
    pages: list[list[int]]
    first_live: list[int]
    """Per group: entries before it are -1."""
    num_entries: int = 0
    num_positions: int = 0
    """Positions that have a page: num_entries * page_size."""
    num_full: int = 0
    """Leading entries that are computed to the end, as far as the host knows."""
    num_shared: int = 0
    """Pages that others held too when this table took them."""

    @property
    def num_held(self) -> int:
        """Pages held, in all groups."""
        return self.num_entries * len(self.pages) - sum(self.first_live)


@dataclass(frozen=True, slots=True)
class Hit:
    """The longest cached prefix of a sequence. Its pages are not pinned: use it before anything else is allocated."""

    num_tokens: int = 0
    pages: list[list[int]] = field(default_factory=list)
    """Per group, -1 outside its window."""
    num_held: int = 0
    """Pages of the hit that others hold: they cost nothing."""
    num_idle: int = 0
    """Pages of the hit that nobody holds: taking them uses up available pages."""
