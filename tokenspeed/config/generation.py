"""What a checkpoint says about generating with it: ids that end a text, and sampling defaults. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenspeed.contracts.errors import FormatError, ParameterError
from tokenspeed.contracts.sampling import SamplingParams

HONOURED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
NOT_YET = {"typical_p": 1.0, "no_repeat_ngram_size": 0}
"""Settings with an effect that are not supported yet, and the value that means none."""


@dataclass(frozen=True)
class GenerationDefaults:
    """eos_token_ids end a text. sampling: defaults of SamplingParams. unsupported: what the checkpoint asks for in
    vain."""

    eos_token_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    unsupported: Mapping[str, Any] = field(default_factory=dict)


def generation_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any]) -> GenerationDefaults:
    """From config.json and generation_config.json (may be empty). Raises FormatError on a value that makes no sense."""
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    sampling = {key: generation[key] for key in HONOURED if generation.get(key) is not None}
    if generation.get("max_new_tokens") is not None:
        sampling["max_tokens"] = generation["max_new_tokens"]
    return _checked(ids, sampling, generation)


def generation_from_gguf(metadata: Mapping[str, Any]) -> GenerationDefaults:
    """From GGUF metadata: eos, end of turn and end of message ids; general.sampling.* where a file has them.

    Raises FormatError on a value that makes no sense.
    """
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ids = list(dict.fromkeys(metadata[key] for key in keys if key in metadata))
    names = {"temp": "temperature", "penalty_repeat": "repetition_penalty"} | {name: name for name in HONOURED[1:4]}
    prefix = "general.sampling."
    sampling = {ours: metadata[prefix + key] for key, ours in names.items() if prefix + key in metadata}
    return _checked(ids, sampling, {})


def _checked(eos: list[Any], sampling: dict[str, Any], settings: Mapping[str, Any]) -> GenerationDefaults:
    if not all(type(token) is int for token in eos):
        raise FormatError(f"the checkpoint's eos_token_id is no token id or list of them: {eos!r:.80}")
    try:
        SamplingParams.from_dict(sampling)
    except ParameterError as error:
        raise FormatError(f"the checkpoint's sampling defaults are not usable: {error}") from None
    unsupported = {key: settings[key] for key, none in NOT_YET.items() if settings.get(key) not in (None, none)}
    return GenerationDefaults(tuple(eos), sampling, unsupported)
