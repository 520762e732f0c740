"""From a config to an executor: find the model, load it, size the KV cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.generation import GenerationDefaults, generation_from_gguf, generation_from_hf
from tokenspeed.config.source import ModelSource, resolve_model, resolve_tokenizer
from tokenspeed.contracts.errors import ConfigError, ModelNotFoundError, UnsupportedError
from tokenspeed.formats.checkpoint import Checkpoint
from tokenspeed.formats.digest import checkpoint_digest
from tokenspeed.formats.gguf import GGUFFile, open_gguf
from tokenspeed.formats.safetensors import open_safetensors
from tokenspeed.kernels.cpu.registration import extension_available
from tokenspeed.models.registry import Definition, define, define_from_hf, read_config, read_json, shipped_configs
from tokenspeed.observability.memory import free_memory
from tokenspeed.ops.kv import KV_TORCH
from tokenspeed.quantization.groups import MODES
from tokenspeed.runner.arena import Arena, PageShape
from tokenspeed.runner.cpu_backend import CpuBackend, why_not
from tokenspeed.runner.executor import LocalExecutor
from tokenspeed.runner.gpu.backend import GpuBackend, triton_available
from tokenspeed.runner.gpu.card import Card, has_e4m3, open_card
from tokenspeed.runner.gpu.largest_step import StepLimits, later_bytes, run_largest_steps
from tokenspeed.runner.layout import page_layout
from tokenspeed.runner.model import DTYPES, LoadedModel, Progress, compute_device, compute_dtype, load_model
from tokenspeed.runner.packed_copy import PackedCopy
from tokenspeed.runner.processors import ProcessingExecutor
from tokenspeed.runner.ref_backend import RefBackend
from tokenspeed.runner.room import CardUse, Room, share_of_card, share_of_free

logger = logging.getLogger("tokenspeed")


@dataclass(frozen=True)
class ModelFiles:
    """An opened model. `source` is None for a shipped config with random weights; `checkpoint` is None for dummies;
    `tokenizer` is where the tokenizer is, None where there is none."""

    name: str
    definition: Definition
    source: ModelSource | None
    checkpoint: Checkpoint | None
    generation: GenerationDefaults
    digest: str
    tokenizer: ModelSource | None = None

    @property
    def metadata(self) -> Mapping[str, Any] | None:
        """GGUF metadata, where the model is a GGUF file."""
        return self.checkpoint.metadata if isinstance(self.checkpoint, GGUFFile) else None


def open_model(config: EngineConfig) -> ModelFiles:
    """Find and open what `config.model` and `config.tokenizer` name, without reading weights."""
    files = _open_model(config)
    if config.generation_config == "none":
        files = replace(files, generation=GenerationDefaults(files.generation.eos_token_ids))
    return replace(files, tokenizer=files.source if config.tokenizer is None else _named_tokenizer(config))


def _named_tokenizer(config: EngineConfig) -> ModelSource:
    assert config.tokenizer is not None
    source = resolve_tokenizer(config.tokenizer, config.download_dir)
    if source.format == "gguf" and "tokenizer.ggml.model" not in open_gguf(source.path).metadata:
        raise ModelNotFoundError(f"--tokenizer {config.tokenizer}: this file holds none")
    return source


def _open_model(config: EngineConfig) -> ModelFiles:
    dummy = config.load_format == "dummy"
    if not dummy and config.model in shipped_configs() and not Path(config.model).exists():
        raise ModelNotFoundError(f"{config.model} is a shipped config without weights: add --load-format dummy")
    if dummy and config.model in (shipped := shipped_configs()):
        settings = shipped[config.model]
        generation = generation_from_hf(settings, {})
        definition = define_from_hf(settings, config.max_model_len)
        return ModelFiles(config.model, definition, None, None, generation, f"dummy {config.model}")
    at_revision = f"{config.model}@{config.revision}" if config.revision else config.model
    source = resolve_model(at_revision, need_weights=not dummy, download_dir=config.download_dir)
    if source.format == "gguf":
        file = open_gguf(source.path)
        definition, generation = define(file, config.max_model_len), generation_from_gguf(file.metadata)
        return ModelFiles(source.name, definition, source, file, generation, checkpoint_digest(file))
    settings = read_config(source.path)
    generation_path = source.path / "generation_config.json"
    generation = generation_from_hf(settings, read_json(generation_path) if generation_path.is_file() else {})
    if dummy:
        definition = define_from_hf(settings, config.max_model_len)
        return ModelFiles(source.name, definition, source, None, generation, f"dummy {source.name}")
    checkpoint = open_safetensors(source.path)
    definition = define_from_hf(settings, config.max_model_len, checkpoint.tensors)
    digest = checkpoint_digest(checkpoint, definition.stored_as)
    return ModelFiles(source.name, definition, source, checkpoint, generation, digest)


@dataclass(frozen=True)
class Prepared:
    """A loaded model with its backend, the shape of its KV pages, and the room for them: on a card an upper bound,
    before any step has run. free_at_start: of the card, before loading."""

    config: EngineConfig
    model: LoadedModel
    backend: RefBackend | CpuBackend | GpuBackend
    shape: PageShape
    room: Room
    card: Card | None = None
    free_at_start: int = 0

    def measured(self, max_model_len: int) -> Room:
        """The room beside the largest step with sequences of up to `max_model_len` tokens; on a card that step is run
        for it, unless the size of the cache was asked for. Raises MemoryLimitError."""
        if self.card is None or not isinstance(self.backend, GpuBackend) or self.config.kv_cache_memory_bytes:
            return self.room
        limits = StepLimits(self.config.max_num_seqs, self.config.step_tokens(self.model.device.type), max_model_len)
        later = later_bytes(limits, self.backend.vocab_size, self.model.dtype.itemsize)
        self.card.settle()
        executor = gpu_executor(self.backend, Arena(1, self.shape, self.model.device), limits.rows, limits.length)
        classifies = self.model.definition.config.num_labels > 0
        layout, size, vocab_size = self.shape.layout, self.shape.page_size, self.backend.vocab_size
        run_largest_steps(executor, limits, layout, size, vocab_size, classifies)
        use = card_use(self.card, self.free_at_start, later)
        executor.close()
        del executor
        self.card.settle()
        return share_of_card(use, self.config)

    def executor(self, num_pages: int, max_num_seqs: int, max_model_len: int) -> ProcessingExecutor:
        """Take memory for the pages and make the executor."""
        memory = None if self.card is None else self.card.pages(num_pages * self.shape.page_bytes)
        arena = Arena(num_pages, self.shape, self.model.device, memory)
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
    card = open_card(compute_device(config))
    free_at_start = card.memory()[0] if card else 0
    model = load_model(files.definition, checkpoint, config)
    kv_dtype = kv_cache_dtype(config, model.dtype, model.device)
    backend = choose_backend(model, config, kv_dtype, progress, _packed_copy(files, checkpoint, config))
    if checkpoint is not None:
        checkpoint.drop_pages()  # the backend has its own copy by now
    if config.quantization is not None or isinstance(backend, GpuBackend):
        model.release()
    if card is not None:
        card.settle()
    if card is not None and isinstance(backend, GpuBackend):
        room = share_of_card(card_use(card, free_at_start), config)
    else:
        room = share_of_free(free_memory(model.device), config)
    layout = page_layout(shape.windows)
    page = PageShape(layout, config.block_size, shape.num_kv_heads, shape.head_dim, kv_dtype)
    return Prepared(config, model, backend, page, room, card, free_at_start)


def card_use(card: Card, free_at_start: int, later: int = 0) -> CardUse:
    """How a card's memory is used now."""
    free, total = card.memory()
    return CardUse(total, free_at_start, free, later)


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
    found = KV_TORCH[name]
    if device.type != "cpu" and found != torch.float8_e4m3fn:
        raise ConfigError(f"--kv-cache-dtype {name} is not supported on {device.type}, only on the CPU")
    if device.type == "cuda" and not has_e4m3(device):
        raise ConfigError(f"--kv-cache-dtype {name}: this GPU has no e4m3 (compute capability 8.9 and later have it)")
    return found


def choose_backend(
    model: LoadedModel,
    config: EngineConfig,
    kv_dtype: torch.dtype,
    progress: Progress | None,
    copy: PackedCopy | None = None,
) -> RefBackend | CpuBackend | GpuBackend:
    """The fast backend where it takes the whole model, else the reference, which is said once.

    --dtype float32 asks for plain float32 arithmetic, which only the reference does. Raises UnsupportedError where that
    would have to be batch-invariant: torch chooses its kernels by the number of rows.
    """
    if model.device.type == "cpu" and config.threads is not None:
        torch.set_num_threads(config.threads)
    if model.device.type != "cpu" or config.dtype == "float32":
        if copy is not None:
            raise ConfigError("--packed-cache is for the CPU's fast backend: leave it or --device and --dtype out")
        if model.device.type == "cuda" and config.dtype != "float32" and triton_available():
            return GpuBackend(model, progress, quantization=config.quantization, batch_invariant=config.batch_invariant)
        _refuse_invariant(config, "--dtype float32" if config.dtype == "float32" else "no Triton")
        return RefBackend(model, progress=progress, quantization=_unpacked_mode(model, config))
    missing = why_not(model, kv_dtype) if extension_available() else ["all: the C++ extension is not built"]
    later = _unpacked_mode(model, config)
    missing += [] if later is None else [f"--quantization {later}"]
    if not missing:
        return CpuBackend(model, config.threads, config.lm_head, progress, copy)
    _refuse_invariant(config, f"no fast kernel for: {', '.join(missing)}")
    no_use = "" if copy is None else "; --packed-cache has no use"
    logger.warning("the slow reference runs this model; no fast kernel for: %s%s", ", ".join(missing), no_use)
    return RefBackend(model, fallback_ops=missing, progress=progress, quantization=later)


def _unpacked_mode(model: LoadedModel, config: EngineConfig) -> str | None:
    """The quantization that a backend has yet to do: on the CPU, int8 and int4 weights come packed."""
    return None if model.device.type == "cpu" and config.quantization in MODES else config.quantization


def _refuse_invariant(config: EngineConfig, reason: str) -> None:
    if config.batch_invariant:
        raise UnsupportedError(
            f"--batch-invariant: the reference backend (ref), which would run this model ({reason}), cannot promise it"
        )


def gpu_executor(backend: GpuBackend, arena: Arena, max_num_seqs: int, max_len: int) -> ProcessingExecutor:
    """The executor of the current CUDA device."""
    from tokenspeed.runner.gpu.executor import GpuExecutor
    from tokenspeed.runner.gpu.link import CudaLink, TritonSteps  # Triton is an optional package

    kernels = TritonSteps(backend.num_heads, backend.model.dtype.itemsize, backend.batch_invariant)
    return GpuExecutor(backend, arena, kernels, CudaLink(), max_num_seqs=max_num_seqs, max_len=max_len)
