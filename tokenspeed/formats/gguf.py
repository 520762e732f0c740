"""GGUF files by memory map, whole or split into shards: header, metadata, tensor table. No torch.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little endian, versions 2 and 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.formats.blocks import BLOCKS, GGML_NAMES, SUPPORTED, row_bytes
from tokenspeed.formats.checkpoint import Bytes, TensorInfo, check_overlap, drop_pages, map_file
from tokenspeed.formats.gguf_metadata import Cursor, Metadata, read_metadata
from tokenspeed.formats.gguf_split import Split, check_shards, shard_paths

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
_MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file, or all shards of a split one; a Checkpoint with metadata, which is the first shard's."""

    path: Path
    """As it was opened: any of the shards."""
    version: int
    alignment: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]
    _maps: dict[str, Bytes]
    """Tensor name -> the map of the file that holds it."""
    format: Literal["gguf"] = "gguf"

    def data(self, name: str) -> Bytes:
        """The tensor's bytes: uint8 [nbytes], a read-only view of the map."""
        info = self.tensors[name]
        return self._maps[name][info.offset : info.offset + info.nbytes]

    def drop_pages(self) -> None:
        for mapped in {id(mapped): mapped for mapped in self._maps.values()}.values():
            drop_pages(mapped)


def open_gguf(path: str | Path) -> GGUFFile:
    """Map a GGUF file, with all shards where it is one of several, and check their whole structure.

    Raises FormatError for anything truncated or inconsistent, a missing shard included, UnsupportedError for big-endian
    files and for tensor types outside `blocks.BLOCKS`, ModelNotFoundError when the file cannot be read.
    """
    path = Path(path)
    opened = _open_file(path)
    split = Split.of(path, opened.metadata)
    if split is None or split.count == 1:
        return opened
    paths = shard_paths(path, split)
    shards = [opened if shard == path else _open_file(shard) for shard in paths]
    check_shards([(shard.path, shard.metadata) for shard in shards])
    return _merge(path, shards, split)


def _open_file(path: Path) -> GGUFFile:
    file = map_file(path)
    cursor = Cursor(path, file)
    version = _read_version(cursor)
    tensor_count = cursor.count("tensor count", _MIN_TENSOR)
    metadata = read_metadata(cursor, cursor.u64("metadata count"))
    alignment = _alignment(path, metadata)
    tensors = _read_tensors(cursor, tensor_count, alignment)
    return GGUFFile(path, version, alignment, metadata, tensors, (path,), dict.fromkeys(tensors, file))


def _merge(path: Path, shards: list[GGUFFile], split: Split) -> GGUFFile:
    tensors: dict[str, TensorInfo] = {}
    maps: dict[str, Bytes] = {}
    for shard in shards:
        for name, info in shard.tensors.items():
            if name in tensors:
                raise FormatError(f"{shard.path}: tensor {name!r} is in another shard as well")
            tensors[name], maps[name] = info, shard._maps[name]
    if len(tensors) != split.tensors:
        raise FormatError(f"{path}: its shards hold {len(tensors)} tensors, split.tensors.count is {split.tensors}")
    first = shards[0]
    files = tuple(shard.path for shard in shards)
    return GGUFFile(path, first.version, first.alignment, first.metadata, tensors, files, maps)


def _read_version(cursor: Cursor) -> int:
    start = cursor.skip(len(MAGIC), "the magic number")
    magic = cursor.file[start : cursor.pos].tobytes()
    if magic != MAGIC:
        raise cursor.error(f"not a GGUF file (it starts with {magic!r})")
    version = cursor.u32("the version")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise UnsupportedError(f"{cursor.path}: big-endian GGUF is not supported (little endian only)")
    if version not in VERSIONS:
        raise cursor.error(f"unknown GGUF version {version} (known: 2, 3)")
    return version


def _alignment(path: Path, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool) or value < 8 or value & (value - 1):
        raise FormatError(f"{path}: general.alignment must be a power of two from 8 on, not {str(value)[:40]}")
    return value


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """Offsets in the table count from the data section, which starts at the next aligned byte after the table."""
    entries: dict[str, TensorInfo] = {}
    for index in range(count):
        info = _read_tensor(cursor, index, alignment)
        if info.name in entries:
            raise cursor.error(f"tensor {info.name!r} comes twice")
        entries[info.name] = info
    start = -(-cursor.pos // alignment) * alignment
    tensors = {name: _place(cursor, info, start) for name, info in entries.items()}
    check_overlap(cursor.path, tensors.values())
    return tensors


def _read_tensor(cursor: Cursor, index: int, alignment: int) -> TensorInfo:
    name = cursor.string(f"name of tensor {index}")
    what = f"tensor {name!r}"
    dims = cursor.u32(f"dimension count of {what}")
    if not name or not 1 <= dims <= MAX_DIMS:
        raise cursor.error(f"tensor {index} has the name {name!r} and {dims} dimensions (1 to {MAX_DIMS} are possible)")
    shape = tuple(cursor.u64(f"shape of {what}") for _ in range(dims))[::-1]
    dtype = _type_name(cursor, cursor.u32(f"type of {what}"), what)
    offset = cursor.u64(f"offset of {what}")
    if offset % alignment:
        raise cursor.error(f"{what} starts at data offset {offset}, which is no multiple of {alignment}")
    if 0 in shape:
        raise cursor.error(f"{what} has the empty shape {list(shape)}")
    try:
        nbytes = prod(shape[:-1]) * row_bytes(dtype, shape[-1])
    except FormatError as error:
        raise cursor.error(f"{what}: {error}") from None
    return TensorInfo(name, shape, dtype, offset, nbytes)


def _type_name(cursor: Cursor, type_id: int, what: str) -> str:
    name = GGML_NAMES.get(type_id)
    if name is None:
        raise cursor.error(f"{what} has the unknown type id {type_id} (supported types: {SUPPORTED})")
    if name not in BLOCKS:
        raise UnsupportedError(f"{cursor.path}: {what} has the unsupported type {name} (supported: {SUPPORTED})")
    return name


def _place(cursor: Cursor, info: TensorInfo, start: int) -> TensorInfo:
    offset, size = start + info.offset, len(cursor.file)
    if offset + info.nbytes > size:
        raise cursor.error(
            f"tensor {info.name!r} {list(info.shape)} {info.dtype} needs bytes {offset} to {offset + info.nbytes}, "
            f"the file ends at {size}"
        )
    return TensorInfo(info.name, info.shape, info.dtype, offset, info.nbytes)
