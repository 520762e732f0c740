"""Where a model is: a name given by a user becomes a local path and a format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenspeed.config.demo import DEMO_NAME, demo_model_path
from tokenspeed.config.hub import fetch_gguf, fetch_repository
from tokenspeed.contracts.errors import ConfigError, ModelNotFoundError, UnsupportedError
from tokenspeed.formats.gguf_split import shard_names

ModelFormat = Literal["gguf", "safetensors"]
_REPOSITORY = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_GGUF_OF_REPOSITORY = re.compile(
    r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)/(?P<file>[\w.][\w./ +-]*\.gguf)(@(?P<revision>[\w./-]+))?", re.ASCII
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine. path: the .gguf file (one of its shards, where it is split), or the directory of
    safetensors. name: as the user gave it."""

    path: Path
    format: ModelFormat
    name: str


def resolve_model(name: str | None, *, need_weights: bool = True, download_dir: str | None = None) -> ModelSource:
    """Find a model, fetching or assembling it where needed.

    name: None for the demo model; a .gguf file, of a split one any shard; a directory; a Hugging Face repository,
    `org/name` or `org/name@revision`; or a .gguf file in one, `org/name/file.gguf` or `org/name/file.gguf@revision`.
    need_weights: False accepts (and fetches) a directory of config and tokenizer alone. download_dir: where what is
    fetched is kept; by default in the hub's own cache.
    Raises ModelNotFoundError where there is none, ConfigError on an ambiguous directory, UnsupportedError on a
    directory of pickle files only.
    """
    if name is None:
        return ModelSource(demo_model_path(), "gguf", DEMO_NAME)
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(path, name)
    if path.is_dir():
        return _from_directory(path, name, need_weights)
    gguf = _GGUF_OF_REPOSITORY.fullmatch(name)
    if gguf is not None and ".." not in gguf["file"].split("/"):
        return ModelSource(fetch_gguf(gguf["repo"], gguf["file"], gguf["revision"], download_dir), "gguf", name)
    repository = _REPOSITORY.fullmatch(name)
    if repository is None or path.suffix == ".gguf":
        raise ModelNotFoundError(
            f"no model at {name}: neither a .gguf file, a directory, nor a repository written org/name[@revision] "
            "or a file in one, org/name/file.gguf[@revision]"
        )
    directory = fetch_repository(repository["repo"], repository["revision"], need_weights, download_dir)
    return _from_directory(directory, name, need_weights)


def resolve_tokenizer(name: str, download_dir: str | None = None) -> ModelSource:
    """Find a tokenizer: beside a model, named as in `resolve_model`, or in a directory without one.

    Raises as `resolve_model` does, and ModelNotFoundError for a directory that has none.
    """
    path = Path(name).expanduser()
    if path.is_dir() and any((path / file).is_file() for file in TOKENIZER_FILES):
        return ModelSource(path, "safetensors", name)
    source = resolve_model(name, need_weights=False, download_dir=download_dir)
    if source.format == "safetensors" and not any((source.path / file).is_file() for file in TOKENIZER_FILES):
        raise ModelNotFoundError(f"--tokenizer {name}: no tokenizer there (looked for {' and '.join(TOKENIZER_FILES)})")
    return source


def _from_file(path: Path, name: str) -> ModelSource:
    if path.suffix == ".gguf":
        return ModelSource(path, "gguf", name)
    if path.suffix in _PICKLE_SUFFIXES:
        raise UnsupportedError(
            f"{path}: pickle weights are not loaded; supported: .gguf, or a directory of .safetensors"
        )
    if path.suffix == ".safetensors":
        raise ConfigError(f"{path}: give the directory that holds it and its config.json")
    raise UnsupportedError(f"{path}: not a model file; supported: .gguf, or a directory of .safetensors")


def _from_directory(directory: Path, name: str, need_weights: bool) -> ModelSource:
    files = sorted(path.name for path in directory.iterdir())
    if any(file.endswith(".safetensors") for file in files) or (not need_weights and "config.json" in files):
        if "config.json" not in files:
            raise ModelNotFoundError(f"{directory}: has .safetensors files but no config.json")
        return ModelSource(directory, "safetensors", name)
    gguf = list(dict.fromkeys(shard_names(file)[0] for file in files if file.endswith(".gguf")))
    if len(gguf) > 1:
        raise ConfigError(f"{directory}: holds {len(gguf)} .gguf models, name one of them: {', '.join(gguf)}")
    if gguf:
        return ModelSource(directory / gguf[0], "gguf", name)
    pickles = [file for file in files if file.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise UnsupportedError(
            f"{directory}: holds pickle weights only ({', '.join(pickles[:3])}); supported: .safetensors, .gguf"
        )
    raise ModelNotFoundError(f"{directory}: no model here (looked for .safetensors with config.json, or one .gguf)")
