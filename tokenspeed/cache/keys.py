"""Prefix keys: a chain hash over pages of token ids, the same in every process that serves the same model."""

from __future__ import annotations

import struct
from hashlib import blake2b

KEY_BYTES = 16


def root_key(model_digest: str, kv_dtype: str, page_size: int) -> bytes:
    """The parent of a sequence's first page: KV of another model, dtype or page size never matches. 16 bytes."""
    fields = (b"tokenspeed-kv-1", model_digest.encode(), kv_dtype.encode(), str(page_size).encode())
    framed = b"".join(struct.pack("<q", len(field)) + field for field in fields)
    return blake2b(framed, digest_size=KEY_BYTES).digest()


class ChainHasher:
    """The keys of one sequence's full pages: hashed once, extended as pages fill.

    key[i] = BLAKE2b-128(key[i - 1] | token ids of page i as little-endian int32 | extra key), key[-1] = root.
    The parts need no framing: the first two have a fixed length under one root.
    """

    def __init__(self, root: bytes, page_size: int, extra_key: bytes = b"") -> None:
        self.keys: list[bytes] = []
        self._root = root
        self._page_size = page_size
        self._extra_key = extra_key

    def extend(self, token_ids: list[int], num_pages: int) -> None:
        """Make `keys` cover the first `num_pages` pages of `token_ids` (int32 each), the whole sequence from its start.

        Raises RuntimeError when those pages are not full.
        """
        start = len(self.keys) * self._page_size
        end = num_pages * self._page_size
        if end <= start:
            return
        if end > len(token_ids):
            raise RuntimeError(f"{num_pages} pages need {end} tokens, the sequence has {len(token_ids)}")
        data = struct.pack(f"<{end - start}i", *token_ids[start:end])
        page_bytes = 4 * self._page_size
        parent, extra = self.keys[-1] if self.keys else self._root, self._extra_key
        for offset in range(0, len(data), page_bytes):
            parent = blake2b(parent + data[offset : offset + page_bytes] + extra, digest_size=KEY_BYTES).digest()
            self.keys.append(parent)

    def copy(self, num_pages: int) -> ChainHasher:
        """A hasher of another sequence that begins with the same `num_pages` pages; known keys are not hashed again."""
        twin = ChainHasher(self._root, self._page_size, self._extra_key)
        twin.keys = self.keys[:num_pages]
        return twin
