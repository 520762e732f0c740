"""A short name for the contents of a checkpoint, the same on every machine."""

from __future__ import annotations

import hashlib

from tokenspeed.formats.checkpoint import Checkpoint

_SAMPLE = 256


def checkpoint_digest(checkpoint: Checkpoint, stored_as: str = "") -> str:
    """Hex digest over the name, shape and type of every tensor and its first and last 256 bytes. stored_as: what those
    do not tell of how values are made of them."""
    digest = hashlib.blake2b(stored_as.encode(), digest_size=16)
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        data = checkpoint.data(name)
        digest.update(f"{name} {info.shape} {info.dtype} {info.nbytes}\n".encode())
        digest.update(data[:_SAMPLE].tobytes())
        digest.update(data[-_SAMPLE:].tobytes())
    return digest.hexdigest()
