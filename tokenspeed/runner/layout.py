"""How layers share pages: layers of one kind form groups of equal size, so that every page of the arena has the same
bytes and any group can take any page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PageLayout:
    """windows: of each group, 0 for full attention. places: per layer its group and its index in it."""

    windows: tuple[int, ...]
    layers_per_group: int
    places: tuple[tuple[int, int], ...]


def page_layout(windows: tuple[int, ...]) -> PageLayout:
    """Group layers by window.

    A group that is not full wastes the rest of its pages; each further group costs a block table. So among the sizes up
    to the rarest kind's count the one that wastes the fewest layers is taken, and of equals the largest.
    """
    kinds = sorted(set(windows))
    counts = [windows.count(kind) for kind in kinds]
    size = min(range(1, min(counts) + 1), key=lambda s: (sum(-count % s for count in counts), -s))
    starts: dict[int, int] = {}
    group_windows: list[int] = []
    for kind, count in zip(kinds, counts, strict=True):
        starts[kind] = len(group_windows)
        group_windows += [kind] * -(-count // size)
    seen = dict.fromkeys(kinds, 0)
    places = []
    for kind in windows:
        places.append((starts[kind] + seen[kind] // size, seen[kind] % size))
        seen[kind] += 1
    return PageLayout(tuple(group_windows), size, tuple(places))
