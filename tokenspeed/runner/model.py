"""A model read in: definition, fused program, and its weights as the file has them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ConfigError, MemoryLimitError, UnsupportedError
from tokenspeed.formats.checkpoint import Checkpoint
from tokenspeed.formats.quantized.layout import Quantization
from tokenspeed.formats.quantized.mxfp4 import METHOD as MXFP4
from tokenspeed.models.registry import Definition
from tokenspeed.observability.memory import free_memory
from tokenspeed.ops.definitions import KvScale
from tokenspeed.ops.kv import KV_TORCH
from tokenspeed.program.fuse import fuse
from tokenspeed.program.kv_scale import with_kv_scales
from tokenspeed.program.program import Program
from tokenspeed.quantization.groups import MODES, refuse_quantized, refuse_stored
from tokenspeed.weights.dummy import dummy_bytes, dummy_weights
from tokenspeed.weights.kv_scales import has_kv_scales, kv_scales
from tokenspeed.weights.loader import load_weights
from tokenspeed.weights.packed import Weight
from tokenspeed.weights.quantized import quantize_weights
from tokenspeed.weights.stored import is_stored

logger = logging.getLogger("tokenspeed")
Progress = Callable[[int, int], None]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadedModel:
    """packed: every weight in its file's own formats, mostly views of the file, or quantised.
    dtype: of computing, where a backend leaves the choice. kv_scales: of the layers whose fp8 pages have some."""

    definition: Definition
    program: Program
    packed: Mapping[str, Weight]
    dtype: torch.dtype
    device: torch.device
    kv_scales: Mapping[int, KvScale] = field(default_factory=dict)

    @property
    def formats(self) -> dict[str, tuple[str, ...]]:
        """Formats of each weight."""
        return {name: weight.formats for name, weight in self.packed.items()}

    @property
    def file_bytes(self) -> dict[str, float]:
        """Bytes of each weight in the file, or as it was quantised at load."""
        return {name: float(weight.nbytes) for name, weight in self.packed.items()}

    @property
    def stored(self) -> frozenset[str]:
        """The weights that a checkpoint holds, in part or whole, by a layout of its quantization_config."""
        return frozenset(name for name, weight in self.packed.items() if is_stored(weight))

    def projections(self, mode: str | None) -> frozenset[str]:
        """The weights that a mode of `groups.GPU_MODES` narrows: every projection but the head; none without a mode.
        Raises ConfigError for matrices that are quantised already, which fp8 unpacks."""
        if mode is None:
            return frozenset()
        for name, weight in self.packed.items():
            if weight.spec.kind != "vector" and mode != "fp8":
                refuse_quantized(mode, name, weight.formats)
        head = self.program.head
        return frozenset(
            name for name, w in self.packed.items() if w.spec.kind in ("linear", "experts") and name != head
        )

    def release(self) -> None:
        """Forget the data of `packed`, of which a backend holds its own copy by now; formats and sizes stay."""
        for weight in self.packed.values():
            weight.segments[:] = [old.released() for old in weight.segments]


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


def load_model(definition: Definition, checkpoint: Checkpoint | None, config: EngineConfig) -> LoadedModel:
    """Map the weights, or make them up; quantise them where the config says so. Raises MemoryLimitError for random
    weights that do not fit."""
    device = compute_device(config)
    if config.quantization == "fp8" and device.type != "cuda":
        raise ConfigError("--quantization fp8 runs on GPUs only: use int8 or int4 here")
    if definition.weights.quantization is not None:
        _check_stored(definition.weights.quantization, checkpoint, config)
    if checkpoint is None:
        _refuse_too_large(dummy_bytes(definition.weights), device)
        packed = dummy_weights(definition.weights, seed=config.seed or 0, device=str(device))
    else:
        packed = load_weights(checkpoint, definition.weights)
    if config.quantization in MODES and device.type == "cpu":
        packed = quantize_weights(packed, config.quantization)
    wanted = "float32" if config.precise and config.dtype == "auto" else config.dtype
    scales = _kv_scales(definition, checkpoint, config)
    program = fuse(with_kv_scales(definition.program(), scales))
    return LoadedModel(definition, program, packed, compute_dtype(wanted, device), device, scales)


def _kv_scales(definition: Definition, checkpoint: Checkpoint | None, config: EngineConfig) -> dict[int, KvScale]:
    """Those of the checkpoint, for fp8 pages. Where it has none the scale is 1, which is said."""
    if checkpoint is None:
        return {}
    if KV_TORCH.get(config.kv_cache_dtype) != torch.float8_e4m3fn:
        if has_kv_scales(checkpoint):
            logger.info("the checkpoint has scales for an fp8 KV cache, which --kv-cache-dtype fp8 asks for")
        return {}
    found = {layer: KvScale(*pair) for layer, pair in kv_scales(checkpoint, len(definition.config.windows)).items()}
    if not found:
        logger.warning(
            "--kv-cache-dtype %s: the checkpoint has no scales for it; keys and values are stored as they are, clipped "
            "at 448",
            config.kv_cache_dtype,
        )
    return found


def _refuse_too_large(nbytes: int, device: torch.device) -> None:
    free = free_memory(device)
    if nbytes > free:
        raise MemoryLimitError(f"the model's random weights take {nbytes} bytes, and {free} are free on {device}")


def _check_stored(stored: Quantization, checkpoint: Checkpoint | None, config: EngineConfig) -> None:
    """Refuse what a quantised checkpoint has no part in, and say what is done otherwise than its config says."""
    refuse_stored(config.quantization, stored.method)
    if checkpoint is None and stored.method != MXFP4:  # of whose experts `dummy_weights` makes codes
        raise UnsupportedError(
            f"--load-format dummy: random weights of quantization_config {stored.method!r} are not made; leave it out "
            "of config.json and use --quantization"
        )
    for note in stored.notes:
        logger.info("quantization_config %r: %s", stored.method, note)
