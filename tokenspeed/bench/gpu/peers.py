"""What other engines took on one H200: figures of record, with the method of our rows.

vLLM 0.24 and SGLang 0.5.17 (its PyTorch sampling), offline, greedy, end of text ignored, no prefix cache, 1024 random
ids in, random weights of the real shapes: (T(129) - T(1)) / 128, medians of three; driver 580, CUDA 13.0, torch 2.11.
vLLM's mixture of experts ran by its own random routing, ours by forced uniform noise: context, not a comparison.
"""

from __future__ import annotations

DECODE_MS: dict[str, dict[str, dict[int, float]]] = {
    "vLLM 0.24": {
        "llama-3.2-1b.bf16": {1: 1.38, 8: 1.85, 32: 1.87, 128: 3.05},
        "llama-3.1-8b.bf16": {1: 4.88, 8: 5.22, 32: 6.19, 128: 10.59},
        "llama-3.1-8b.fp8": {1: 3.51, 32: 5.27, 128: 9.05},
        "qwen3-30b-a3b.bf16": {1: 4.17, 8: 8.99, 32: 16.17, 128: 21.15},
    },
    "SGLang 0.5.17": {
        "llama-3.2-1b.bf16": {1: 1.25, 8: 1.39, 32: 1.71, 128: 2.86},
        "llama-3.1-8b.bf16": {1: 4.85, 8: 5.19, 32: 6.12, 128: 10.81},
        "llama-3.1-8b.fp8": {1: 3.50, 32: 4.71, 128: 9.06},
    },
}
"""Milliseconds per token of each sequence, by engine, model and sequences decoding together."""
FIRST_MS: dict[str, dict[str, float]] = {
    "vLLM 0.24": {
        "llama-3.2-1b.bf16": 8.7,
        "llama-3.1-8b.bf16": 24.8,
        "llama-3.1-8b.fp8": 16.6,
        "qwen3-30b-a3b.bf16": 46.6,
    },
    "SGLang 0.5.17": {"llama-3.2-1b.bf16": 9.8, "llama-3.1-8b.bf16": 29.0, "llama-3.1-8b.fp8": 19.3},
}
"""Milliseconds to the first token of one prompt of 1024."""
START_S: dict[str, dict[str, tuple[float, float]]] = {
    "vLLM 0.24": {
        "llama-3.2-1b.bf16": (52, 61),
        "llama-3.1-8b.bf16": (36, 39),
        "llama-3.1-8b.fp8": (51, 51),
        "qwen3-30b-a3b.bf16": (71, 79),
    },
    "SGLang 0.5.17": {"llama-3.2-1b.bf16": (93, 93), "llama-3.1-8b.bf16": (61, 61), "llama-3.1-8b.fp8": (43, 43)},
}
"""Seconds of starting, from and to."""
CARD = "h200"
"""What our ids of the same card begin with."""
OTHER_WORK = ("qwen3-30b-a3b.bf16",)
"""Models of which theirs and ours are not compared: experts were chosen differently."""
