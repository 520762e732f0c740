"""How many bytes the KV cache may take, on a machine's memory and on a GPU's."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import MemoryLimitError

CACHE_SHARE = 0.25
"""Of the memory that is free after loading, where nobody says more."""
MARGIN_BYTES = 512 * 2**20
"""Of a GPU's memory, what stays free whatever the settings: graphs captured later, workspaces of libraries, and what
the driver takes per kernel."""


@dataclass(frozen=True)
class Room:
    """cache_bytes: for KV pages. free_bytes: free in all. flag: the one that gives the cache more."""

    cache_bytes: int
    free_bytes: int
    flag: str = "--kv-cache-memory-bytes"


@dataclass(frozen=True)
class CardUse:
    """Bytes of a GPU: in all, free before this engine took any, and free now. `later`: what it will still take."""

    total: int
    free_at_start: int
    free: int
    later: int = 0

    @property
    def margin(self) -> int:
        """Bytes that stay free."""
        return MARGIN_BYTES + self.later


def share_of_free(free: int, config: EngineConfig) -> Room:
    """What was asked for, or a share of what is free. Raises MemoryLimitError for more than is free."""
    budget = config.kv_cache_memory_bytes or int(free * CACHE_SHARE)
    if budget > free:
        raise MemoryLimitError(f"--kv-cache-memory-bytes {budget} is more than the {free} that are free: lower it")
    return Room(budget, free)


def share_of_card(use: CardUse, config: EngineConfig) -> Room:
    """What was asked for, or the engine's share of the card less what it has taken, within what is free less a margin.

    The share is gpu_memory_utilization of the whole card, as in vLLM; what others took before counts against the card,
    not against the share. Raises MemoryLimitError where nothing is left.
    """
    spare = max(0, use.free - use.margin)
    asked = config.kv_cache_memory_bytes
    if asked is not None:
        if asked > spare:
            raise MemoryLimitError(
                f"--kv-cache-memory-bytes {asked} is more than {spare}: {use.free} bytes are free on the GPU, of which "
                f"{use.margin} are kept for graphs and libraries: lower it"
            )
        return Room(asked, use.free)
    share = int(config.gpu_memory_utilization * use.total)
    taken = max(0, use.free_at_start - use.free)
    budget = min(share - taken - use.later, spare)
    if budget > 0:
        return Room(budget, use.free, "--gpu-memory-utilization")
    raise MemoryLimitError(
        f"no memory is left for the KV cache: the engine has taken {_mib(taken)} MiB and needs {_mib(use.later)} more "
        f"of its share of {_mib(share)} (--gpu-memory-utilization {config.gpu_memory_utilization} of "
        f"{_mib(use.total)}), {_mib(use.free)} are free and {_mib(use.margin)} stay so: raise it, end what "
        "else uses the GPU, lower --max-num-batched-tokens or --max-num-seqs, or add --quantization fp8"
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f}"
