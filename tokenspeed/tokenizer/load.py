"""The tokenizer of a model source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.config.source import ModelSource
from tokenspeed.contracts.errors import ConfigError, ModelNotFoundError
from tokenspeed.tokenizer.base import Tokenizer
from tokenspeed.tokenizer.gguf import tokenizer_from_gguf
from tokenspeed.tokenizer.hf import tokenizer_from_json, tokenizer_from_spm_file


def load_tokenizer(source: ModelSource, metadata: Mapping[str, Any] | None = None) -> Tokenizer:
    """Load the tokenizer of a model; `metadata` is that of a GGUF file and needed for one.

    Raises ModelNotFoundError where a directory has no tokenizer, FormatError on a broken one, UnsupportedError on a
    kind that is not supported.
    """
    if source.format == "gguf":
        if metadata is None:
            raise ConfigError(f"{source.name}: the tokenizer of a GGUF file needs the file's metadata")
        return tokenizer_from_gguf(metadata)
    if (source.path / "tokenizer.json").is_file():
        return tokenizer_from_json(source.path)
    if (source.path / "tokenizer.model").is_file():
        return tokenizer_from_spm_file(source.path)
    raise ModelNotFoundError(f"{source.path}: no tokenizer here (looked for tokenizer.json and tokenizer.model)")
