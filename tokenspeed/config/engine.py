"""Every setting of the engine, once: `LLM(...)` takes these as keywords and the CLI makes its flags of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

from tokenspeed.config.settings import check, flag, setting
from tokenspeed.contracts.errors import ConfigError

DTYPES = ("auto", "bfloat16", "float16", "float32")
KV_DTYPES = ("auto", "bfloat16", "float16", "float32", "int8", "fp8", "fp8_e4m3")
QUANTIZATIONS = ("int8", "int4", "fp8", "mxfp4")
LOAD_FORMATS = ("auto", "dummy")
GENERATION_CONFIGS = ("auto", "none")
LM_HEADS = ("screened", "full")
STEP_TOKENS = {"cpu": 512, "cuda": 2048}
"""Most tokens of a step where nobody asks for a number. One H200 reads 8k prompts of 8B at 31,700 / 34,400 / 34,700
tokens a second in steps of 512 / 2048 / 8192 (`h200.llama-3.1-8b.bf16.mixed.prefill_rate`)."""
DEVICES = ("auto", "cpu", "cuda")
PRECISE: dict[str, tuple[str, ...]] = {
    "dtype": ("auto", "float32"),
    "kv_cache_dtype": ("auto", "float32", "bfloat16"),
}
"""What `precise` goes with."""


@dataclass(frozen=True)
class EngineConfig:
    """Names are vLLM's where the meaning is the same. Raises ConfigError on a value that is not usable."""

    model: str | None = setting(
        None,
        "a .gguf file, a directory, a Hugging Face repository id, or a shipped config (with --load-format dummy); "
        "by default the demo model, Gemma 3 270M",
    )
    revision: str | None = setting(None, "revision of the Hugging Face repository")
    tokenizer: str | None = setting(
        None,
        "a directory, a .gguf file or a Hugging Face repository (org/name@revision) whose tokenizer to use; by default "
        "the model's own",
    )
    download_dir: str | None = setting(
        None, "where files of Hugging Face repositories are kept; by default in the hub's cache, which HF_HOME moves"
    )
    trust_remote_code: bool = setting(
        False, "refused: no code of a repository is ever run, models are those that this engine has itself"
    )
    generation_config: str = setting(
        "auto",
        "sampling defaults of requests: auto takes those that the checkpoint states, none takes OpenAI's",
        choices=GENERATION_CONFIGS,
    )
    chat_template: str | None = setting(None, "a template file, a template, or the built-in name 'plain'")
    device: str = setting("auto", "where to run; auto takes a GPU if there is one", choices=DEVICES)
    dtype: str = setting("auto", "compute type; auto is bfloat16, float16 is for GPUs", choices=DTYPES)
    kv_cache_dtype: str = setting(
        "auto",
        "type of the KV cache; auto is the compute type; int8 (CPU) has a scale per 32 values, fp8 (e4m3) those "
        "of the checkpoint, one per layer for keys and one for values, else none",
        choices=KV_DTYPES,
    )
    quantization: str | None = setting(
        None,
        "quantise matrices at load: on the CPU int8 and int4 in groups of 32 columns (int4 leaves the embedding and "
        "the head at int8); on GPUs, but for the embedding and the head, int8 and fp8 per output channel, int4 in "
        "groups of 128 columns, mxfp4 in blocks of 32; by default they stay as they come",
        choices=QUANTIZATIONS,
    )
    precise: bool = setting(
        False, "accuracy before speed: auto types become float32, and nothing that costs accuracy is on"
    )
    batch_invariant: bool = setting(
        False,
        "a request gets the same tokens and log-probabilities, bit by bit, whatever runs beside it and however its "
        "prompt is fed; on GPUs slower kernels do this, the CPU's fast ones always do",
    )
    packed_cache: str | None = setting(
        None, "a directory for copies of the weights as the CPU backend packs them: the next load reads its copy"
    )
    load_format: str = setting("auto", "auto reads the weights; dummy makes up random ones", choices=LOAD_FORMATS)
    threads: int | None = setting(None, "CPU threads; by default as many as this process may use", least=1)
    lm_head: str = setting(
        "screened",
        "on the CPU, screened reads of a Q8_0 head only what may hold the next token (the token is the same); full "
        "reads all of it",
        choices=LM_HEADS,
    )
    max_model_len: int | None = setting(
        None,
        "most tokens of one sequence, prompt and output; by default the model's context as far as memory holds it",
        least=2,
    )
    max_num_seqs: int = setting(64, "most sequences computed at once", least=1)
    max_num_batched_tokens: int | None = setting(
        None, "most tokens fed per step, by all sequences; by default 512, on a GPU 2048", least=1
    )
    block_size: int = setting(16, "tokens per KV page", least=1)
    kv_cache_memory_bytes: int | None = setting(
        None,
        "bytes of KV cache; by default a quarter of the free memory (on a GPU see --gpu-memory-utilization), at most "
        "what all sequences could fill",
        least=1,
    )
    gpu_memory_utilization: float = setting(
        0.9,
        "on a GPU, the part of its memory that this engine may use in all: weights, the largest step, KV cache",
        least=0,
        most=1,
        above=True,
    )
    enable_prefix_caching: bool = setting(True, "reuse the KV of shared prompt prefixes")
    target_itl_ms: float | None = setting(
        None,
        "while something decodes, feed prompts in chunks that keep a step within this many milliseconds",
        least=0,
        above=True,
    )
    seed: int | None = setting(None, "makes requests that name no seed repeatable")

    def __post_init__(self) -> None:
        check(self)
        if self.trust_remote_code:
            raise ConfigError(
                "--trust-remote-code is refused: this engine runs no code of a repository, whoever vouches for it, and "
                "needs none for the models that it has; leave it out"
            )
        if self.revision is not None and self.model is None:
            raise ConfigError("--revision needs --model, a Hugging Face repository id")
        for name, allowed in PRECISE.items():
            if self.precise and getattr(self, name) not in allowed:
                raise ConfigError(
                    f"--precise contradicts {flag(name)} {getattr(self, name)}: it goes with {' or '.join(allowed)}"
                )

    def step_tokens(self, device: str) -> int:
        """Most tokens of a step on a device of this type."""
        return self.max_num_batched_tokens or STEP_TOKENS[device]

    @classmethod
    def from_kwargs(cls, settings: dict[str, Any]) -> EngineConfig:
        """From keywords, paths among them; an unknown one is a ConfigError that lists the known ones."""
        known = [each.name for each in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(f"unknown engine setting: {', '.join(unknown)} (known: {', '.join(known)})")
        return cls(**{name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in settings.items()})
