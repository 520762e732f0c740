"""safetensors files by memory map: one file, or a directory with one or with an index of shards. No torch.

Layout: https://huggingface.co/docs/safetensors (u64 header length, JSON header, data without holes).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeGuard

from tokenspeed.contracts.errors import FormatError, ModelNotFoundError, UnsupportedError
from tokenspeed.formats.checkpoint import Bytes, TensorInfo, check_overlap, drop_pages, map_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_BITS: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class SafetensorsFile:
    """An open safetensors checkpoint of one or more files; a Checkpoint."""

    path: Path
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]
    _maps: dict[str, Bytes]
    """Tensor name -> the map of the file that holds it."""
    format: Literal["safetensors"] = "safetensors"

    def data(self, name: str) -> Bytes:
        """The tensor's bytes: uint8 [nbytes], a read-only view of the map."""
        info = self.tensors[name]
        return self._maps[name][info.offset : info.offset + info.nbytes]

    def drop_pages(self) -> None:
        for mapped in {id(mapped): mapped for mapped in self._maps.values()}.values():
            drop_pages(mapped)


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Map a .safetensors file, or the model.safetensors or the indexed shards of a directory, and check the structure.

    Any known dtype opens; which of them can be loaded is the loader's matter. Raises FormatError for anything truncated
    or inconsistent, UnsupportedError for pickle formats, ModelNotFoundError when nothing is there.
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise UnsupportedError(f"{path}: pickle checkpoints are not supported (supported: .safetensors, .gguf)")
    if not path.is_dir():
        return _merge(path, [path])
    if (path / SINGLE).exists():
        return _merge(path, [path / SINGLE])
    if (path / INDEX).exists():
        return _open_index(path)
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise UnsupportedError(
            f"{path}: only pickle checkpoints here ({', '.join(pickles[:3])}), which are not supported "
            "(supported: .safetensors, .gguf)"
        )
    raise ModelNotFoundError(f"{path}: holds neither {SINGLE} nor {INDEX}")


def _open_index(path: Path) -> SafetensorsFile:
    index = path / INDEX
    weight_map = _parse_object(index, map_file(index).tobytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map is missing or empty")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise FormatError(f"{index}: tensor {name!r} is mapped to {str(shard)[:80]!r}, which is no file name")
        if not (path / shard).is_file():
            raise FormatError(f"{index}: tensor {name!r} is mapped to {shard!r}, which is missing")
    merged = _merge(path, [path / shard for shard in dict.fromkeys(weight_map.values())])
    for name, shard in weight_map.items():
        if name not in merged.tensors:
            raise FormatError(f"{index}: tensor {name!r} is in no shard ({shard!r} should hold it)")
    return merged


def _merge(path: Path, files: list[Path]) -> SafetensorsFile:
    tensors: dict[str, TensorInfo] = {}
    maps: dict[str, Bytes] = {}
    for file in files:
        data = map_file(file)
        for name, info in _read_header(file, data).items():
            if name in tensors:
                raise FormatError(f"{file}: tensor {name!r} is in another shard as well")
            tensors[name] = info
            maps[name] = data
    return SafetensorsFile(path, tensors, tuple(files), maps)


def _read_header(path: Path, file: Bytes) -> dict[str, TensorInfo]:
    if len(file) < 8:
        raise FormatError(f"{path}: truncated: {len(file)} bytes are no safetensors file")
    size = int.from_bytes(file[:8].tobytes(), "little")
    if size > min(MAX_HEADER, len(file) - 8):
        raise FormatError(f"{path}: header length {size} does not fit a file of {len(file)} bytes (limit {MAX_HEADER})")
    start = 8 + size
    header = _parse_object(path, file[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, start) for name, entry in header.items()}
    _check_cover(path, tensors, start, len(file))
    return tensors


def _parse_object(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            raise FormatError(f"{path}: {next(n for n in names if names.count(n) > 1)!r} comes twice")
        return fields

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not JSON ({str(error)[:120]})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: the header is not a JSON object")
    return value


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    what = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise FormatError(f"{what}: its entry is not an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise FormatError(f"{what}: unknown dtype {str(dtype)[:40]!r}")
    if not _is_sizes(shape):
        raise FormatError(f"{what}: shape is no list of sizes")
    if not _is_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise FormatError(f"{what}: data_offsets is no pair of ascending offsets")
    nbytes = span[1] - span[0]
    if prod(shape) * _BITS[dtype] != nbytes * 8:
        raise FormatError(f"{what}: shape {str(shape)[:80]} {dtype} does not take its {nbytes} bytes")
    return TensorInfo(name, tuple(shape), dtype, start + span[0], nbytes)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_cover(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """The format demands that tensors cover the data section: no holes, no overlap, nothing behind them."""
    end = start
    for info in check_overlap(path, tensors.values()):
        if info.offset > end:
            raise FormatError(f"{path}: {info.offset - end} bytes before tensor {info.name!r} belong to no tensor")
        end = info.offset + info.nbytes
    if end != size:
        raise FormatError(f"{path}: the tensors end at byte {end}, the file at {size}")
