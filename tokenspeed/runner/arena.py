"""The bytes of the KV cache. Page ids come from `cache`; only this file knows where a page lies."""

from __future__ import annotations

import torch

from tokenspeed.contracts.errors import MemoryLimitError


class Arena:
    """One tensor [pages, layers, 2, page_size, kv_heads, head_dim]; index 2 is key, value. A page is one chunk."""

    def __init__(
        self,
        num_pages: int,
        num_layers: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Left uninitialised: untouched pages cost no memory, and no position is read before it is written.
        self.kv = torch.empty(num_pages, num_layers, 2, page_size, kv_heads, head_dim, dtype=dtype, device=device)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.kv.stride(0) * self.kv.element_size()


def page_bytes(num_layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, keys and values."""
    return num_layers * 2 * page_size * kv_heads * head_dim * dtype.itemsize


def fit_pages(
    *,
    bytes_per_page: int,
    page_size: int,
    budget: int,
    free: int,
    asked_len: int | None,
    context: int,
    max_num_seqs: int,
) -> tuple[int, int]:
    """Number of pages and max_model_len for a budget of bytes.

    A length that was asked for must fit; the model's own context is lowered to what fits. Raises MemoryLimitError with
    what is needed, what is there, and the flags that help.
    """
    pages = budget // bytes_per_page
    length = asked_len if asked_len is not None else min(context, pages * page_size)
    needed = -(-length // page_size)
    if pages < max(1, needed) or length < 2:
        raise MemoryLimitError(
            f"the KV cache of one sequence of {max(length, page_size)} tokens needs "
            f"{_mib(max(1, needed) * bytes_per_page)} MiB; {_mib(budget)} MiB are set aside, {_mib(free)} MiB free: "
            "raise --kv-cache-memory-bytes, or lower --max-model-len or --kv-cache-dtype"
        )
    return min(pages, needed * max_num_seqs), length


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"
