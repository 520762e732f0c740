"""Page groups: layers that keep the same positions share block tables, so each group has one per sequence."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.contracts.errors import ConfigError


@dataclass(frozen=True)
class GroupSpec:
    """`window` 0: full attention. Else a query at position q reads positions q - window + 1 to q, of those there are.

    Raises ConfigError on a negative window.
    """

    window: int = 0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ConfigError(f"window of a page group must be at least 0, got {self.window}")

    def first_live(self, position: int, page_size: int) -> int:
        """The first entry of a block table that queries from `position` on read."""
        return max(0, position - self.window + 1) // page_size if self.window else 0

    def most_pages(self, num_tokens: int, page_size: int) -> int:
        """Pages without which a sequence cannot compute its first `num_tokens` tokens one by one."""
        pages = -(-num_tokens // page_size)
        if not self.window:
            return pages
        # A window of w positions touches one page more than w - 1 of them can fill, wherever it begins.
        return min(pages, -(-(self.window - 1) // page_size) + 1)


FULL_ONLY = (GroupSpec(),)
