"""Writes a safetensors checkpoint of a model's real shapes, in shards, as fast as the disk takes it.

All tensors are cut out of one block of random bf16 values that is repeated to the end of each shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.formats.safetensors import INDEX
from tokenspeed.models.registry import define_from_hf

SHARD_BYTES = 4_500_000_000
BLOCK_VALUES = 1 << 24
STD = 0.02
_ITEM = 2
_LAYERS = "num_hidden_layers"

Shapes = dict[str, tuple[int, ...]]


def write_checkpoint(folder: Path, settings: Mapping[str, Any], seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Write config.json, the index and the shards, each of at most `shard_bytes` or one tensor; bytes of the tensors.
    settings: the contents of config.json. Raises UnsupportedError for a model that is not known."""
    shards = list(_shards(tensor_shapes(settings), shard_bytes))
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    (folder / "config.json").write_text(json.dumps(dict(settings)))
    weight_map = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(BLOCK_VALUES, dtype=torch.float32).normal_(0, STD, generator=generator).bfloat16()
    block = values.view(torch.uint8).numpy().data
    with ThreadPoolExecutor(len(shards)) as pool:  # a file takes one writer at a time
        paths = [folder / name for name in names]
        return sum(pool.map(lambda path, shapes: _write_shard(path, shapes, block), paths, shards))


def resized(settings: Mapping[str, Any], nbytes: float) -> dict[str, Any]:
    """The same model with as many layers as come nearest to `nbytes` of tensors. Raises ConfigError where one layer is
    too much by half of it."""
    one, two = (checkpoint_bytes({**settings, _LAYERS: layers}) for layers in (1, 2))
    layers = round(1 + (nbytes - one) / (two - one))
    if layers < 1:
        raise ConfigError(f"{nbytes / 1e9:g} GB: this model with one layer takes {one / 1e9:.2f} GB already")
    return {**settings, _LAYERS: layers}


def checkpoint_bytes(settings: Mapping[str, Any]) -> int:
    """Of all tensors together."""
    return sum(prod(shape) * _ITEM for shape in tensor_shapes(settings).values())


def tensor_shapes(settings: Mapping[str, Any]) -> Shapes:
    """Of every tensor of a checkpoint, by name."""
    specs = define_from_hf(settings).weights.specs.values()
    return {source.name: spec.tensor_shape(source) for spec in specs for source in spec.hf}


def _shards(shapes: Shapes, limit: int) -> Iterator[Shapes]:
    gathered: Shapes = {}
    size = 0
    for name, shape in shapes.items():
        nbytes = prod(shape) * _ITEM
        if gathered and size + nbytes > limit:
            yield gathered
            gathered, size = {}, 0
        gathered[name] = shape
        size += nbytes
    yield gathered


def _write_shard(path: Path, shapes: Shapes, block: memoryview) -> int:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * _ITEM
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = 0
        while written < end:
            at = written % len(block)
            written += os.write(file.fileno(), block[at : at + end - written])
    return end
