"""Names and metadata of GGUF files that are split into shards. No torch.

As llama.cpp's gguf-split writes them: `name-00001-of-00003.gguf`, each shard with split.no (from 0), split.count and
split.tensors.count (of all shards together); other metadata is in the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed.contracts.errors import FormatError

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_OWN_KEYS = ("split.no", "general.alignment")
"""Keys whose values belong to one shard alone."""


def shard_names(name: str) -> list[str]:
    """Every name of the set that a shard's file name, or path, belongs to, in order; of another name itself alone."""
    found = _NAME.fullmatch(name)
    if found is None:
        return [name]
    return [shard_name(found["stem"], number, int(found["count"])) for number in range(int(found["count"]))] or [name]


def shard_name(stem: str, number: int, count: int) -> str:
    """The name of shard `number`, from 0, of `count`."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


@dataclass(frozen=True)
class Split:
    """What a shard says of its set. number: from 0."""

    number: int
    count: int
    tensors: int

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, Any]) -> Split | None:
        """None for a file that is not split. Raises FormatError on values that are not possible."""
        if "split.count" not in metadata:
            return None
        number, count, tensors = (_count(path, metadata, f"split.{key}") for key in ("no", "count", "tensors.count"))
        if number >= count:
            raise FormatError(f"{path}: split.no is {number}, split.count {count}")
        return cls(number, count, tensors)


def shard_paths(path: Path, split: Split) -> list[Path]:
    """Paths of all shards, given one of them. Raises FormatError for a shard under another's name, or one missing."""
    names = shard_names(path.name)
    if len(names) != split.count or names[split.number] != path.name:
        expected = shard_name("NAME", split.number, split.count)
        raise FormatError(
            f"{path}: this is shard {split.number + 1} of {split.count}; under a name other than {expected} "
            "its other shards cannot be found"
        )
    paths = [path.with_name(name) for name in names]
    missing = [shard.name for shard in paths if not shard.is_file()]
    if missing:
        raise FormatError(f"{path}: {len(missing)} of its {split.count} shards are missing: {', '.join(missing[:5])}")
    return paths


def check_shards(shards: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Shards in order, with their metadata, must agree. Raises FormatError naming the one that does not."""
    first_path, first = shards[0]
    for number, (path, metadata) in enumerate(shards):
        split = Split.of(path, metadata)
        if split is None or split.number != number:
            raise FormatError(f"{path}: split.no is {metadata.get('split.no')}, its name says {number}")
        for key in metadata:
            if key not in _OWN_KEYS and (key not in first or metadata[key] != first[key]):
                ours, theirs = (f"{m.get(key)!s:.40}" for m in (metadata, first))
                raise FormatError(f"{path}: {key} is {ours}, in {first_path.name} it is {theirs}")


def _count(path: Path, metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key)
    if type(value) is not int or value < 0:
        raise FormatError(f"{path}: {key} must be a number, not {str(value)[:40]}")
    return value
