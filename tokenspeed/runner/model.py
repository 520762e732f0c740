"""A model made ready to run: definition, fused program, and its weights as the reference backend holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.formats.checkpoint import Checkpoint
from tokenspeed.models.registry import Definition
from tokenspeed.program.fuse import fuse
from tokenspeed.program.program import Program
from tokenspeed.weights.dummy import dummy_weights
from tokenspeed.weights.loader import load_weights
from tokenspeed.weights.unpacked import unpack_all

Progress = Callable[[int, int], None]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadedModel:
    """weights: matrices [rows, cols] in the compute dtype, vectors in float32. file_bytes: bytes of each as stored."""

    definition: Definition
    program: Program
    weights: Mapping[str, torch.Tensor]
    formats: Mapping[str, tuple[str, ...]]
    file_bytes: Mapping[str, float]
    dtype: torch.dtype
    device: torch.device


def compute_device(config: EngineConfig) -> torch.device:
    """The device a config means. Raises ConfigError when it asks for a GPU that is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no usable GPU was found; leave it out to run on the CPU")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def compute_dtype(name: str, device: torch.device, flag: str = "--dtype") -> torch.dtype:
    """The torch dtype that `flag` names. Raises ConfigError for float16 on the CPU: hundreds of times slower there."""
    if name == "float16" and device.type == "cpu":
        raise ConfigError(f"{flag} float16 does not run well on the CPU; use bfloat16 or float32")
    return DTYPES["bfloat16" if name == "auto" else name]


def load_model(
    definition: Definition, checkpoint: Checkpoint | None, config: EngineConfig, progress: Progress | None = None
) -> LoadedModel:
    """Load or make up the weights, unpack each once. `progress(done, total)` counts bytes of the file."""
    device = compute_device(config)
    dtype = compute_dtype(config.dtype, device)
    if checkpoint is None:
        packed = dummy_weights(definition.weights, seed=config.seed or 0, device=str(device))
    else:
        packed = load_weights(checkpoint, definition.weights)
    tensors = {name: tensor.to(device) for name, tensor in unpack_all(packed, dtype, progress).items()}
    return LoadedModel(
        definition,
        fuse(definition.program()),
        tensors,
        {name: tuple(weight.formats) for name, weight in packed.items()},
        {name: float(weight.nbytes) for name, weight in packed.items()},
        dtype,
        device,
    )
