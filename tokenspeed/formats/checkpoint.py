"""What every checkpoint reader offers: tensors by name, their bytes as views of the memory map. No torch."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from tokenspeed.contracts.errors import FormatError, ModelNotFoundError

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is in torch order (rows first); `offset` is in bytes from its file's start."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """In upper case: "F32", "BF16", "Q4_K", ..."""
    offset: int
    nbytes: int


class Checkpoint(Protocol):
    """An open model file, or a directory of shards."""

    @property
    def path(self) -> Path: ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that tensors lie in."""
        ...

    @property
    def format(self) -> Literal["gguf", "safetensors"]: ...

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...

    def data(self, name: str) -> Bytes:
        """The tensor's bytes: uint8 [nbytes], a read-only view of the map. KeyError for an unknown name."""
        ...

    def drop_pages(self) -> None:
        """Give the map's pages back to the system; they are read again where they are needed."""
        ...


class FileMap(mmap.mmap):
    """A map of a whole file, which knows what file that is."""

    path: Path
    identity: tuple[int, ...]


def map_file(path: Path) -> Bytes:
    """Map a whole file: uint8 [size], read-only. ModelNotFoundError if it cannot be read, FormatError if empty."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise FormatError(f"{path}: the file is empty")
            made = FileMap(file.fileno(), 0, access=mmap.ACCESS_READ)
            made.path, made.identity = path, _identity(file.fileno())
            return np.frombuffer(made, dtype=np.uint8)
    except OSError as error:
        raise ModelNotFoundError(f"{path}: cannot be read ({error.strerror or error})") from None


def file_part(view: Bytes) -> tuple[FileMap, int] | None:
    """Which file's map `view` is a part of, and the offset of its first byte there; None for other memory."""
    owner, start = _owner(view)
    return (owner, start) if isinstance(owner, FileMap) else None


def open_mapped(owner: FileMap) -> int:
    """A descriptor of the mapped file, for the caller to close. Raises FormatError where another file has taken its
    place or it has been written to, ModelNotFoundError where it cannot be opened."""
    try:
        descriptor = os.open(owner.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelNotFoundError(f"{owner.path}: cannot be read ({error.strerror or error})") from None
    if _identity(descriptor) != owner.identity:
        os.close(descriptor)
        raise FormatError(f"{owner.path}: the file was changed while it was loaded")
    return descriptor


def _identity(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def drop_pages(view: Bytes) -> None:
    """Give back to the system the pages that lie wholly in `view`, a part or all of a map of `map_file`; they are read
    again where they are needed. Other memory is left as it is."""
    owner, start = _owner(view)
    if not isinstance(owner, mmap.mmap):
        return
    page = mmap.PAGESIZE
    first, end = -(-start // page) * page, start + view.nbytes
    last = end if end == len(owner) else end // page * page
    if last > first:
        owner.madvise(mmap.MADV_DONTNEED, first, last - first)


def _owner(view: Bytes) -> tuple[object, int]:
    """Whose memory an array shows, and at which byte of it."""
    root = view
    while isinstance(root.base, np.ndarray):
        root = root.base
    owner = root.base.obj if isinstance(root.base, memoryview) else root.base
    return owner, view.ctypes.data - root.ctypes.data


def check_overlap(path: Path, tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """The tensors in file order. Raises FormatError when two share bytes."""
    ordered = sorted(tensors, key=lambda t: (t.offset, t.nbytes))
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise FormatError(f"{path}: tensors {before.name!r} and {after.name!r} overlap")
    return ordered
