"""Every setting of the engine, once: `LLM(...)` takes these as keywords and the CLI makes its flags of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from tokenspeed.contracts.errors import ConfigError

DTYPES = ("auto", "bfloat16", "float16", "float32")
KV_DTYPES = ("auto", "bfloat16", "float16", "float32", "int8", "fp8", "fp8_e4m3")
QUANTIZATIONS = ("int8", "int4", "fp8")
LOAD_FORMATS = ("auto", "dummy")
LM_HEADS = ("screened", "full")
DEVICES = ("auto", "cpu", "cuda")
PRECISE: dict[str, tuple[str, ...]] = {
    "dtype": ("auto", "float32"),
    "kv_cache_dtype": ("auto", "float32", "bfloat16"),
}
"""What `precise` goes with."""


def _setting(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class EngineConfig:
    """Names are vLLM's where the meaning is the same. Raises ConfigError on a value that is not usable."""

    model: str | None = _setting(
        None,
        "a .gguf file, a directory, a Hugging Face repository id, or a shipped config (with --load-format dummy); "
        "by default the demo model, Gemma 3 270M",
    )
    revision: str | None = _setting(None, "revision of the Hugging Face repository")
    chat_template: str | None = _setting(None, "a template file, a template, or the built-in name 'plain'")
    device: str = _setting("auto", "where to run; auto takes a GPU if there is one", DEVICES)
    dtype: str = _setting("auto", "compute type; auto is bfloat16, float16 is for GPUs", DTYPES)
    kv_cache_dtype: str = _setting(
        "auto",
        "type of the KV cache; auto is the compute type; int8 has a scale per 32 values, fp8 (e4m3) none",
        KV_DTYPES,
    )
    quantization: str | None = _setting(
        None,
        "quantise matrices at load: int8 and int4 in groups of 32 columns (int4 leaves the embedding and the head at "
        "int8); fp8 on GPUs, per output channel, but for the embedding and the head; by default they stay as they come",
        QUANTIZATIONS,
    )
    precise: bool = _setting(
        False, "accuracy before speed: auto types become float32, and nothing that costs accuracy is on"
    )
    batch_invariant: bool = _setting(
        False,
        "a request gets the same tokens and log-probabilities, bit by bit, whatever runs beside it and however its "
        "prompt is fed; on GPUs slower kernels do this, the CPU's fast ones always do",
    )
    packed_cache: str | None = _setting(
        None, "a directory for copies of the weights as the CPU backend packs them: the next load reads its copy"
    )
    load_format: str = _setting("auto", "auto reads the weights; dummy makes up random ones", LOAD_FORMATS)
    threads: int | None = _setting(None, "CPU threads; by default as many as this process may use")
    lm_head: str = _setting(
        "screened",
        "on the CPU, screened reads of a Q8_0 head only what may hold the next token (the token is the same); full "
        "reads all of it",
        LM_HEADS,
    )
    max_model_len: int | None = _setting(
        None, "most tokens of one sequence, prompt and output; by default the model's context as far as memory holds it"
    )
    max_num_seqs: int = _setting(64, "most sequences computed at once")
    max_num_batched_tokens: int = _setting(512, "most tokens fed per step, by all sequences")
    block_size: int = _setting(16, "tokens per KV page")
    kv_cache_memory_bytes: int | None = _setting(
        None,
        "bytes of KV cache; by default a quarter of the free memory (on a GPU see --gpu-memory-utilization), at most "
        "what all sequences could fill",
    )
    gpu_memory_utilization: float = _setting(
        0.9, "on a GPU, the part of its memory that this engine may use in all: weights, the largest step, KV cache"
    )
    enable_prefix_caching: bool = _setting(True, "reuse the KV of shared prompt prefixes")
    target_itl_ms: float | None = _setting(
        None, "while something decodes, feed prompts in chunks that keep a step within this many milliseconds"
    )
    seed: int | None = _setting(None, "makes requests that name no seed repeatable")

    def __post_init__(self) -> None:
        hints = get_type_hints(EngineConfig)
        for setting in fields(self):
            value = getattr(self, setting.name)
            _check_type(setting.name, value, hints[setting.name])
            choices = setting.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ConfigError(f"{flag(setting.name)} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("threads", "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes"):
            _at_least(name, getattr(self, name), 1)
        _at_least("max_model_len", self.max_model_len, 2)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"{flag('gpu_memory_utilization')} must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if self.revision is not None and self.model is None:
            raise ConfigError("--revision needs --model, a Hugging Face repository id")
        for name, allowed in PRECISE.items():
            if self.precise and getattr(self, name) not in allowed:
                raise ConfigError(
                    f"--precise contradicts {flag(name)} {getattr(self, name)}: it goes with {' or '.join(allowed)}"
                )

    @classmethod
    def from_kwargs(cls, settings: dict[str, Any]) -> EngineConfig:
        """From keywords, paths among them; an unknown one is a ConfigError that lists the known ones."""
        known = [setting.name for setting in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(f"unknown engine setting: {', '.join(unknown)} (known: {', '.join(known)})")
        return cls(**{name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in settings.items()})


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def _check_type(name: str, value: Any, hint: Any) -> None:
    wanted = hint.__args__ if hasattr(hint, "__args__") else (hint,)
    if float in wanted:
        wanted = (*wanted, int)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join("none" if kind is type(None) else kind.__name__ for kind in wanted)
        raise ConfigError(f"{flag(name)} must be {names}, got {value!r}")


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{flag(name)} must be at least {least}, got {value}")
