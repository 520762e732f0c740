"""TokenSpeed: an LLM inference engine that reports every token against the limit of the machine it ran on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenspeed.contracts.sampling import SamplingParams

if TYPE_CHECKING:
    from tokenspeed.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # LLM pulls in torch; the HTTP and command-line processes must be able to import this package without it.
    if name == "LLM":
        from tokenspeed.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'tokenspeed' has no attribute {name!r}")
