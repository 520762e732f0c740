"""Model directories of the Hugging Face hub."""

from __future__ import annotations

import glob
from pathlib import Path

from tokenspeed.contracts.errors import ModelNotFoundError
from tokenspeed.formats.gguf_split import shard_names

_SETTINGS = ["*.json", "*.jinja", "tokenizer.model"]
_WEIGHTS = ["*.safetensors"]


def fetch_repository(repo: str, revision: str | None, need_weights: bool, cache: str | None = None) -> Path:
    """Download the files of a repository that a model is loaded from, and return their directory in `cache`, by default
    the hub's own.

    Raises ModelNotFoundError where the repository or revision does not exist, is gated, or cannot be reached and is not
    in the cache.
    """
    return _fetch(repo, revision, _SETTINGS + _WEIGHTS if need_weights else _SETTINGS, cache)


def fetch_gguf(repo: str, file: str, revision: str | None, cache: str | None = None) -> Path:
    """Download a .gguf file of a repository, with all its shards where the name is one of a split file's.

    Returns where the named one lies. Raises ModelNotFoundError as `fetch_repository` does, and for files that the
    repository does not have.
    """
    names = shard_names(file)
    directory = _fetch(repo, revision, [glob.escape(name) for name in names], cache)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelNotFoundError(f"the Hugging Face repository {repo} has no {', '.join(missing[:3])}")
    return directory / file


def _fetch(repo: str, revision: str | None, patterns: list[str], cache: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelNotFoundError(f"{repo}: fetching a repository needs `pip install huggingface_hub`") from None
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, cache_dir=cache))
    except Exception as error:  # HTTP, network, cache and name errors have no useful common class
        at = f" at revision {revision}" if revision else ""
        raise ModelNotFoundError(f"cannot fetch {repo}{at} from the Hugging Face hub: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access to it must be granted; accept its terms on its page and run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "no network, and it is not in the local cache; a local directory or .gguf file works without"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
