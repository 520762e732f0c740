"""From a config to an executor: find the model, load it, size the KV cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.generation import GenerationDefaults, generation_from_gguf, generation_from_hf
from tokenspeed.config.source import ModelSource, resolve_model
from tokenspeed.contracts.errors import ConfigError, MemoryLimitError, ModelNotFoundError
from tokenspeed.contracts.executor import Executor
from tokenspeed.formats.checkpoint import Checkpoint
from tokenspeed.formats.digest import checkpoint_digest
from tokenspeed.formats.gguf import GGUFFile, open_gguf
from tokenspeed.formats.safetensors import open_safetensors
from tokenspeed.kernels.cpu.registration import extension_available
from tokenspeed.models.registry import Definition, define, define_from_hf, read_json, shipped_configs
from tokenspeed.observability.memory import free_memory
from tokenspeed.ops.kv import KV_TORCH
from tokenspeed.runner.arena import Arena, PageShape
from tokenspeed.runner.cpu_backend import CpuBackend, why_not
from tokenspeed.runner.executor import LocalExecutor
from tokenspeed.runner.gpu.backend import GpuBackend, triton_available
from tokenspeed.runner.layout import page_layout
from tokenspeed.runner.model import DTYPES, LoadedModel, Progress, compute_dtype, load_model
from tokenspeed.runner.packed_copy import PackedCopy
from tokenspeed.runner.ref_backend import RefBackend

logger = logging.getLogger("tokenspeed")
DEFAULT_CACHE_SHARE = 0.25


@dataclass(frozen=True)
class ModelFiles:
    """An opened model. `source` is None for a shipped config with random weights; `checkpoint` is None for dummies."""

    name: str
    definition: Definition
    source: ModelSource | None
    checkpoint: Checkpoint | None
    generation: GenerationDefaults
    digest: str

    @property
    def metadata(self) -> Mapping[str, Any] | None:
        """GGUF metadata, where the model is a GGUF file."""
        return self.checkpoint.metadata if isinstance(self.checkpoint, GGUFFile) else None


def open_model(config: EngineConfig) -> ModelFiles:
    """Find and open what `config.model` names, without reading weights."""
    dummy = config.load_format == "dummy"
    if not dummy and config.model in shipped_configs() and not Path(config.model).exists():
        raise ModelNotFoundError(f"{config.model} is a shipped config without weights: add --load-format dummy")
    if dummy and config.model in (shipped := shipped_configs()):
        settings = shipped[config.model]
        generation = generation_from_hf(settings, {})
        return ModelFiles(config.model, define_from_hf(settings), None, None, generation, f"dummy {config.model}")
    at_revision = f"{config.model}@{config.revision}" if config.revision else config.model
    source = resolve_model(at_revision, need_weights=not dummy)
    if source.format == "gguf":
        file = open_gguf(source.path)
        definition, generation = define(file), generation_from_gguf(file.metadata)
        return ModelFiles(source.name, definition, source, file, generation, checkpoint_digest(file))
    settings = read_json(source.path / "config.json")
    generation_path = source.path / "generation_config.json"
    generation = generation_from_hf(settings, read_json(generation_path) if generation_path.is_file() else {})
    if dummy:
        return ModelFiles(source.name, define_from_hf(settings), source, None, generation, f"dummy {source.name}")
    checkpoint = open_safetensors(source.path)
    digest = checkpoint_digest(checkpoint)
    return ModelFiles(source.name, define_from_hf(settings), source, checkpoint, generation, digest)


@dataclass(frozen=True)
class Prepared:
    """A loaded model with its backend, the shape of its KV pages, and the bytes set aside and free for them."""

    model: LoadedModel
    backend: RefBackend | CpuBackend | GpuBackend
    shape: PageShape
    cache_bytes: int
    free_bytes: int

    def executor(self, num_pages: int, max_num_seqs: int, max_model_len: int) -> Executor:
        """Reserve the pages and make the executor."""
        arena = Arena(num_pages, self.shape, self.model.device)
        if isinstance(self.backend, GpuBackend):
            return gpu_executor(self.backend, arena, max_num_seqs, max_model_len)
        self.backend.bind(arena)
        return LocalExecutor(self.backend, arena, self.model.definition.config.vocab_size)


def prepare(files: ModelFiles, config: EngineConfig, progress: Progress | None = None) -> Prepared:
    """Load the weights and see how much memory is left for the KV cache.

    Raises ConfigError for a length beyond the model's context, and for a packed cache that has no use here or cannot be
    written; MemoryLimitError for more KV cache than there is memory.
    """
    shape = files.definition.config
    if config.max_model_len is not None and config.max_model_len > shape.context:
        raise ConfigError(f"--max-model-len {config.max_model_len} is more than the model's context of {shape.context}")
    checkpoint = None if config.load_format == "dummy" else files.checkpoint
    model = load_model(files.definition, checkpoint, config)
    kv_dtype = kv_cache_dtype(config, model.dtype, model.device)
    backend = choose_backend(model, config, kv_dtype, progress, _packed_copy(files, checkpoint, config))
    if checkpoint is not None:
        checkpoint.drop_pages()  # the backend has its own copy by now
    if config.quantization in ("int8", "int4"):
        model.release()
    free = free_memory(model.device)
    budget = config.kv_cache_memory_bytes or int(free * DEFAULT_CACHE_SHARE)
    if budget > free:
        raise MemoryLimitError(f"--kv-cache-memory-bytes {budget} is more than the {free} that are free: lower it")
    layout = page_layout(shape.windows)
    page = PageShape(layout, config.block_size, shape.num_kv_heads, shape.head_dim, kv_dtype)
    return Prepared(model, backend, page, budget, free)


def _packed_copy(files: ModelFiles, checkpoint: Checkpoint | None, config: EngineConfig) -> PackedCopy | None:
    if config.packed_cache is None:
        return None
    if checkpoint is None:
        raise ConfigError("--packed-cache has no use with --load-format dummy: leave one of them out")
    return PackedCopy.of(config.packed_cache, files.digest, checkpoint)


def kv_cache_dtype(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of KV pages beside activations of `dtype`. Raises ConfigError for one the device does not take."""
    name = config.kv_cache_dtype
    if name == "auto":
        return dtype
    if name in DTYPES:
        return compute_dtype(name, device, "--kv-cache-dtype")
    if device.type != "cpu":
        raise ConfigError(f"--kv-cache-dtype {name} is not supported on {device.type}, only on the CPU")
    return KV_TORCH[name]


def choose_backend(
    model: LoadedModel,
    config: EngineConfig,
    kv_dtype: torch.dtype,
    progress: Progress | None,
    copy: PackedCopy | None = None,
) -> RefBackend | CpuBackend | GpuBackend:
    """The fast backend where it takes the whole model, else the reference, which is said once.

    --dtype float32 asks for plain float32 arithmetic, which only the reference does.
    """
    if model.device.type == "cpu" and config.threads is not None:
        torch.set_num_threads(config.threads)
    if model.device.type != "cpu" or config.dtype == "float32":
        if copy is not None:
            raise ConfigError("--packed-cache is for the CPU's fast backend: leave it or --device and --dtype out")
        if model.device.type == "cuda" and config.dtype != "float32" and triton_available():
            return GpuBackend(model, progress, quantization=config.quantization)
        return RefBackend(model, progress=progress)
    missing = why_not(model, kv_dtype) if extension_available() else ["all: the C++ extension is not built"]
    if not missing:
        return CpuBackend(model, config.threads, config.lm_head, progress, copy)
    no_use = "" if copy is None else "; --packed-cache has no use"
    logger.warning("the slow reference runs this model; no fast kernel for: %s%s", ", ".join(missing), no_use)
    return RefBackend(model, fallback_ops=missing, progress=progress)


def gpu_executor(backend: GpuBackend, arena: Arena, max_num_seqs: int, max_len: int) -> Executor:
    """The executor of the current CUDA device."""
    from tokenspeed.runner.gpu.executor import GpuExecutor
    from tokenspeed.runner.gpu.link import CudaLink, TritonSteps  # Triton is an optional package

    kernels = TritonSteps(backend.num_heads, backend.model.dtype.itemsize)
    return GpuExecutor(backend, arena, kernels, CudaLink(), max_num_seqs=max_num_seqs, max_len=max_len)
