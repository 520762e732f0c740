"""The tiny models of the parity tests, by name: settings of transformers configs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

VOCAB, CONTEXT, WINDOW = 199, 128, 8
PROMPT_LENGTHS = (21, 40)
"""Both past the window, neither a multiple of a page."""


@dataclass(frozen=True)
class Case:
    """A model type of transformers and its settings. implied_keys: its GGUF leaves out what its architecture tells.
    gguf: whether there are such files of it."""

    name: str
    model_type: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    implied_keys: bool = False
    gguf: bool = True

    def with_k_widths(self) -> Case:
        """The same family as wide as K-quants need, except for `down`, which is left to a fallback format."""
        wide = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
        return replace(self, settings=self.settings | wide | {"intermediate_size": 288})


def _rope(theta: float, kind: str = "default", **scaling: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **scaling}


LLAMA3_ROPE = _rope(
    5e4, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


def _case(
    name: str, model_type: str, seed: int, implied_keys: bool = False, gguf: bool = True, **settings: Any
) -> Case:
    common = {
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "num_hidden_layers": 2,
        "intermediate_size": 160,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }
    return Case(name, model_type, seed, common | settings, implied_keys, gguf)


def _gemma3(name: str, seed: int, full: dict[str, Any], implied_keys: bool = False, **settings: Any) -> Case:
    layers, pattern = settings["num_hidden_layers"], 6 if implied_keys else 3
    kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    local = _rope(10000.0 if implied_keys else 500.0)
    return _case(
        name,
        "gemma3_text",
        seed,
        implied_keys,
        sliding_window=WINDOW,
        layer_types=kinds,
        rope_parameters={"sliding_attention": local, "full_attention": full},
        query_pre_attn_scalar=settings["head_dim"],
        **settings,
    )


def _heads(hidden: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return dict(zip(names, (hidden, heads, kv_heads, head_dim), strict=True))


LONG_ROPE: dict[str, Any] = {
    "rope_parameters": _rope(
        1e4,
        "longrope",
        partial_rotary_factor=0.75,
        short_factor=[1.0 + 0.1 * i for i in range(12)],
        long_factor=[1.0 + i * i for i in range(12)],
        original_max_position_embeddings=16,
    ),
    "original_max_position_embeddings": 16,
}
"""The prompts are longer than the original context."""
YARN_ROPE = _rope(1e4, "yarn", factor=4.0, original_max_position_embeddings=32)
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 5.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
    "logits_scaling": 0.7,
    "rms_norm_eps": 1e-2,
}
CAPS: dict[str, Any] = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}
"""Small enough to show."""


def _gemma2(name: str, seed: int, **settings: Any) -> Case:
    return _case(
        name,
        "gemma2",
        seed,
        sliding_window=WINDOW,
        num_hidden_layers=3,
        rope_parameters=_rope(1e4),
        query_pre_attn_scalar=settings["head_dim"],
        **CAPS,
        **settings,
    )


def _experts(number: int, chosen: int, ff: int) -> dict[str, Any]:
    """Under every name that configs have for them."""
    return {
        **dict.fromkeys(("num_local_experts", "n_routed_experts"), number),
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": ff,
    }


HALF_ROPE = _rope(1e4, partial_rotary_factor=0.5)
MOE_CASES = (
    _case("mixtral", "mixtral", 41, rope_parameters=_rope(1e4), **_experts(5, 2, 160), **_heads(96, 6, 2, 16)),
    _case(
        "mixtral-window",
        "mixtral",
        42,
        False,
        False,
        rope_parameters=_rope(1e4),
        sliding_window=WINDOW,
        tie_word_embeddings=True,
        **_experts(4, 1, 160),
        **_heads(96, 3, 1, 32),
    ),
    _case(
        "qwen3_moe",
        "qwen3_moe",
        543,
        rope_parameters=_rope(1e4),
        norm_topk_prob=True,
        **_experts(7, 3, 64),
        **_heads(64, 6, 3, 32),
    ),
    _case(
        "qwen3_moe-mixed",
        "qwen3_moe",
        44,
        False,
        False,
        rope_parameters=_rope(1e4),
        num_hidden_layers=5,
        mlp_only_layers=[3],
        decoder_sparse_step=2,
        norm_topk_prob=False,
        attention_bias=True,
        tie_word_embeddings=True,
        **_experts(5, 3, 40),
        **_heads(64, 5, 1, 32),
    ),
    _case(
        "glm4_moe",
        "glm4_moe",
        245,
        rope_parameters=HALF_ROPE,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        use_qk_norm=True,
        attention_bias=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        **_experts(6, 2, 32),
        **_heads(96, 6, 2, 16),
    ),
    _case(
        "glm4_moe-groups",
        "glm4_moe",
        346,
        rope_parameters=HALF_ROPE,
        first_k_dense_replace=0,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        tie_word_embeddings=True,
        num_nextn_predict_layers=0,
        **_experts(12, 4, 32),
        **_heads(96, 3, 1, 32),
    ),
    _case(
        "gpt_oss",
        "gpt_oss",
        447,
        rope_parameters=YARN_ROPE | {"truncate": False},
        sliding_window=WINDOW,
        **_experts(5, 3, 160),
        **_heads(96, 6, 2, 16),
    ),
    _case(
        "gpt_oss-limit",
        "gpt_oss",
        148,
        False,
        False,
        rope_parameters=_rope(1e4),
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"],
        swiglu_limit=0.7,
        swiglu_alpha=1.3,
        attention_bias=False,
        tie_word_embeddings=True,
        **_experts(4, 2, 96),
        **_heads(64, 4, 1, 16),
    ),
    _case("minimax_m2", "minimax_m2", 149, rope_parameters=HALF_ROPE, **_experts(6, 2, 160), **_heads(96, 6, 2, 16)),
    _case(
        "minimax_m2-tied",
        "minimax_m2",
        150,
        rope_parameters=HALF_ROPE,
        tie_word_embeddings=True,
        **_experts(9, 4, 160),
        **_heads(96, 3, 1, 32),
    ),
)
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _case("llama", "llama", 11, rope_parameters=_rope(5e4), num_hidden_layers=3, **_heads(96, 6, 2, 16)),
        _case(
            "llama-llama3", "llama", 12, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, **_heads(64, 4, 2, 32)
        ),
        _case("llama-linear", "llama", 13, rope_parameters=_rope(1e4, "linear", factor=4.0), **_heads(160, 5, 1, 32)),
        _case("qwen2", "qwen2", 14, rope_parameters=_rope(1e5), **_heads(96, 6, 3, 16)),
        _case("qwen2-tied", "qwen2", 15, rope_parameters=_rope(1e6), tie_word_embeddings=True, **_heads(96, 3, 1, 32)),
        _case("qwen3", "qwen3", 16, rope_parameters=_rope(1e6), num_hidden_layers=3, **_heads(64, 6, 3, 32)),
        _case("qwen3-tied", "qwen3", 17, rope_parameters=_rope(1e4), tie_word_embeddings=True, **_heads(64, 5, 1, 32)),
        _gemma3("gemma3", 18, _rope(2e5), num_hidden_layers=4, tie_word_embeddings=True, **_heads(96, 6, 2, 32)),
        _gemma3("gemma3-linear", 19, _rope(2e5, "linear", factor=8.0), num_hidden_layers=3, **_heads(96, 3, 1, 64)),
        _gemma3("gemma3-implied", 20, _rope(1e6), True, num_hidden_layers=7, **_heads(32, 2, 1, 16)),
        _case("llama-bias", "llama", 21, rope_parameters=_rope(1e4), **BIASES, **_heads(96, 3, 1, 32)),
        _case("llama-yarn", "llama", 22, rope_parameters=YARN_ROPE, **_heads(96, 6, 2, 16)),
        _case(
            "llama-dynamic",
            "llama",
            23,
            False,
            False,
            rope_parameters=_rope(1e4, "dynamic", factor=2.0),
            **_heads(64, 4, 4, 16),
        ),
        _case(
            "mistral",
            "mistral",
            24,
            False,
            False,
            rope_parameters=_rope(1e4),
            sliding_window=WINDOW,
            **_heads(96, 6, 2, 16),
        ),
        _case(
            "mistral-full",
            "mistral",
            25,
            rope_parameters=_rope(1e5),
            sliding_window=None,
            tie_word_embeddings=True,
            **_heads(64, 5, 1, 32),
        ),
        _case(
            "ministral",
            "ministral",
            26,
            False,
            False,
            rope_parameters=_rope(1e4),
            sliding_window=WINDOW,
            num_hidden_layers=3,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            **_heads(96, 3, 1, 32),
        ),
        _case("phi3", "phi3", 27, rope_parameters=_rope(1e4), sliding_window=WINDOW, **_heads(96, 6, 2, 16)),
        _case("phi3-long", "phi3", 28, tie_word_embeddings=True, **LONG_ROPE, **_heads(96, 3, 1, 32)),
        _case("glm4", "glm4", 29, rope_parameters=_rope(1e4, partial_rotary_factor=0.5), **_heads(96, 6, 2, 16)),
        _case(
            "glm4-plain",
            "glm4",
            30,
            rope_parameters=_rope(1e4, partial_rotary_factor=1.0),
            attention_bias=False,
            tie_word_embeddings=True,
            **_heads(96, 3, 1, 32),
        ),
        _case("olmo2", "olmo2", 131, rope_parameters=_rope(5e5), **_heads(96, 6, 3, 16)),
        _case(
            "olmo2-bias",
            "olmo2",
            32,
            rope_parameters=_rope(1e4),
            attention_bias=True,
            tie_word_embeddings=True,
            **_heads(96, 3, 1, 32),
        ),
        _case(
            "smollm3",
            "smollm3",
            33,
            rope_parameters=_rope(5e4),
            num_hidden_layers=5,
            tie_word_embeddings=True,
            **_heads(64, 4, 2, 16),
        ),
        _case(
            "smollm3-listed",
            "smollm3",
            34,
            False,
            False,
            rope_parameters=_rope(1e4),
            no_rope_layers=[0, 1],
            **BIASES,
            **_heads(96, 3, 1, 32),
        ),
        _case("granite", "granite", 35, rope_parameters=_rope(1e4), **GRANITE, **_heads(96, 6, 2, 16)),
        _case(
            "granite-bias",
            "granite",
            36,
            rope_parameters=_rope(1e4),
            tie_word_embeddings=True,
            **BIASES,
            **GRANITE,
            **_heads(96, 3, 1, 32),
        ),
        _gemma2("gemma2", 37, tie_word_embeddings=True, **_heads(96, 6, 2, 32)),
        _gemma2("gemma2-one", 38, tie_word_embeddings=True, **_heads(96, 3, 1, 64)),
        *MOE_CASES,
    )
}
FAMILY_CASES = ("llama", "llama-llama3", "qwen2", "qwen3", "gemma3")
"""One case per family, and the one with a tensor of rope divisors."""
MOE_FAMILY_CASES = ("mixtral", "qwen3_moe", "glm4_moe", "gpt_oss", "minimax_m2")
MORE_FAMILY_CASES = ("mistral-full", "phi3", "glm4", "olmo2", "smollm3", "granite", "gemma2", *MOE_FAMILY_CASES)
"""The families whose longer tests are `slow`."""
ROUTING_MARGIN = 5e-4
"""Between an expert that is chosen and one that is not: beyond it the C++ walk chooses as transformers does."""
GGUF_CASES = tuple(name for name, case in CASES.items() if case.gguf and not case.implied_keys)
