"""What the decoder families share: one config type, and readers of config.json and GGUF metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.layers.attention import Attention
from tokenspeed.layers.moe import Moe
from tokenspeed.ops.rope import (
    Rope,
    linear_rope,
    longrope,
    original_context,
    rope_from_hf,
    rope_kind,
    yarn_rope,
    yarn_scale,
)
from tokenspeed.program.recorder import Recorder, Value


class NormNames(NamedTuple):
    """What a checkpoint calls the norms of a layer: before and after attention, before and after the MLP; None where
    the family has none."""

    attn: str | None
    attn_post: str | None
    mlp: str | None
    mlp_post: str | None


PRE_NORMS = NormNames("input_layernorm", None, "post_attention_layernorm", None)
SANDWICH_NORMS = NormNames(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)


class ExpertNames(NamedTuple):
    """What a checkpoint calls the parts of a layer with experts, below `block`; parts are gate, up and down."""

    block: str = "mlp"
    router: str = "gate"
    correction: str = "gate.e_score_correction_bias"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    turned: bool = False
    """Instead of a tensor for each part of each expert: gate_up_proj [experts, d, 2 ff], whose columns are gate and up
    by turns, and down_proj [experts, ff, d]."""


QWEN_EXPERTS = ExpertNames()
MIXTRAL_EXPERTS = ExpertNames(block="block_sparse_moe", parts=("w1", "w3", "w2"))


@dataclass(frozen=True)
class DenseConfig:
    """Sizes and variants of a decoder. ropes and windows have one entry per layer; window 0 is full attention."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ff_size: int
    norm_eps: float
    context: int
    ropes: tuple[Rope, ...]
    windows: tuple[int, ...]
    attention_scale: float
    tied: bool
    act: str = "silu"
    embed_scale: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """A norm on each query and key head."""
    qk_norm_whole: bool = False
    """A norm on all query heads together, and one on all key heads."""
    norms: NormNames = PRE_NORMS
    norm_plus_one: bool = False
    logits_divisor: float = 1.0
    score_cap: float = 0.0
    """Attention scores x become score_cap * tanh(x / score_cap); 0 leaves them. logit_cap: the same of logits."""
    logit_cap: float = 0.0
    fused: tuple[str, ...] = ()
    """Of qkv and gate_up, what a checkpoint holds as one tensor."""
    interleaved: bool = False
    """Pairs that turn lie side by side in Q and K rows of all its files."""
    gguf_permuted: bool = False
    """The same of its GGUF files alone (llama-architecture files are so)."""
    long_ropes: tuple[Rope, ...] = ()
    """LongRoPE: what `ropes` are in an engine for more than `short_context` tokens."""
    short_context: int = 0
    num_labels: int = 0
    """Of a classification head; 0: it has a language head instead."""
    headless: bool = False
    """The checkpoint has no head at all, for embeddings alone; the program ends as if it were tied."""
    stretched: bool = False
    """`ropes` are the long ones."""
    sinks: bool = False
    """Each query head has a score of its own that takes part in the softmax."""
    moe: Moe | None = None
    """Of the layers with experts; `sparse` says for each layer whether it is one."""
    sparse: tuple[bool, ...] = ()
    expert_names: ExpertNames = QWEN_EXPERTS
    expert_format: str = "BF16"
    """Of random experts."""
    gguf_mlp_norm: str = "ffn_norm"
    """What GGUF files call the norm before the MLP."""
    later_layers: int = 0
    """Layers at the end of the files that predict further tokens, and are not read."""

    @property
    def q_size(self) -> int:
        """Columns of all query heads."""
        return self.num_heads * self.head_dim

    def attention(self, layer: int) -> Attention:
        """Attention of one layer."""
        return Attention(
            self.head_dim,
            self.ropes[layer],
            self.attention_scale,
            self.windows[layer],
            self.norm_eps,
            self.qk_norm_whole,
            self.score_cap,
        )

    def opened(self, length: int | None) -> DenseConfig:
        """The config in an engine whose sequences may have `length` tokens, by default the whole context.

        LongRoPE has two rotations and keys in the cache are rotated once, so one is chosen for all sequences: the long
        one where a sequence may outgrow the original context. (transformers chooses by each sequence's length.)
        """
        if not self.long_ropes or (length or self.context) <= self.short_context:
            return self
        return replace(self, ropes=self.long_ropes, stretched=True)

    @property
    def kv_size(self) -> int:
        """Columns of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Family:
    """One model family: its names, its config readers and its wiring."""

    name: str
    hf_types: tuple[str, ...]
    """`model_type` of config.json."""
    gguf_types: tuple[str, ...]
    """`general.architecture` of GGUF."""
    from_hf: Callable[[Mapping[str, Any]], DenseConfig]
    from_gguf: Callable[[GGUFConfig], DenseConfig]
    wire: Callable[[Recorder, DenseConfig], Value]


def hf_config(config: Mapping[str, Any], theta: float = 10000.0, **variant: Any) -> DenseConfig:
    """From config.json in the common names; `variant` sets what the family does differently. theta: base of the
    rotation where the file names none."""
    hidden, heads, layers = (size(config, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_dim = variant.get("head_dim") or size(config, "head_dim", hidden // heads)
    if "act" not in variant:
        refuse_other(config, "hidden_act", "silu")
    fields: dict[str, Any] = {
        "vocab_size": size(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": size(config, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "ff_size": size(config, "intermediate_size"),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "context": size(config, "max_position_embeddings", 2048),
        "windows": (0,) * layers,
        "attention_scale": head_dim**-0.5,
        "tied": config.get("tie_word_embeddings", False),
    }
    if "ropes" not in variant:
        fields |= _hf_ropes(config, theta, head_dim, layers)
    return DenseConfig(**fields | variant)


def _hf_ropes(config: Mapping[str, Any], theta: float, head_dim: int, layers: int) -> dict[str, Any]:
    """Rotations of config.json, in the names of transformers 5 (rope_parameters) and before (rope_theta,
    rope_scaling); the same in every layer."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    context = size(config, "max_position_embeddings", 2048)
    base = float(given.get("rope_theta") or config.get("rope_theta") or theta)
    part = given.get("partial_rotary_factor") or config.get("partial_rotary_factor", 1.0)
    if config.get("original_max_position_embeddings"):
        given = {**given, "original_max_position_embeddings": config["original_max_position_embeddings"]}
    short = rope_from_hf(base, int(head_dim * part), given, context)
    if rope_kind(given) != "longrope":
        return {"ropes": (short,) * layers}
    long = rope_from_hf(base, int(head_dim * part), given, context, long=True)
    return {
        "ropes": (short,) * layers,
        "long_ropes": (long,) * layers,
        "short_context": original_context(given, context),
    }


def hf_windows(config: Mapping[str, Any], kinds: Sequence[str]) -> tuple[int, ...]:
    """The window of every layer from `layer_types`, or from `kinds` where config.json has none."""
    kinds, layers = config.get("layer_types") or kinds, size(config, "num_hidden_layers")
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise FormatError(f"layer_types must be {layers} of sliding_attention and full_attention, got {kinds}")
    window = size(config, "sliding_window") if "sliding_attention" in kinds else 0
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def hf_biases(config: Mapping[str, Any]) -> dict[str, bool]:
    """The biases that attention_bias and mlp_bias ask for."""
    attention, mlp = (bool(config.get(key)) for key in ("attention_bias", "mlp_bias"))
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": mlp}


def need(config: Mapping[str, Any], key: str) -> Any:
    """A value that config.json must have. Raises FormatError naming it."""
    if config.get(key) is None:
        raise FormatError(f"config.json has no {key}")
    return config[key]


def size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of config.json. Raises FormatError naming it."""
    value = need(config, key) if default is None or config.get(key) is not None else default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def count(config: Mapping[str, Any], key: str, default: int) -> int:
    """An integer of config.json that may be 0. Raises FormatError naming it."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise FormatError(f"config.json: {key} must be 0 or a positive integer, got {value!r}")
    return value


def refuse_other(config: Mapping[str, Any], key: str, wanted: str) -> None:
    """Raise UnsupportedError where config.json asks for another `key` than the one its family runs with."""
    if config.get(key) not in (None, wanted):
        raise UnsupportedError(f"{key} {config[key]!r} is not supported (supported: {wanted})")


def refuse_set(config: Mapping[str, Any], *keys: str) -> None:
    """Raise UnsupportedError naming the first of `keys` that config.json sets."""
    for key in keys:
        if config.get(key):
            raise UnsupportedError(f"{config.get('model_type')} with {key} is not supported")


def positive(value: Any, name: str) -> float:
    """A factor. Raises FormatError naming it where it is no number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise FormatError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


GATING = {"softmax": 1, "sigmoid": 2, "logits": 3}
"""What `expert_gating_func` of a GGUF file says of each score of `Moe` (llama.cpp's llama_expert_gating_func_type)."""


@dataclass(frozen=True)
class GGUFConfig:
    """GGUF metadata of one architecture. tensors: names of those that the file has. rope_divisors: contents of
    `rope_freqs.weight`, `rope_factors_short.weight` and `rope_factors_long.weight`, of those that it has."""

    metadata: Mapping[str, Any]
    vocab_size: int
    tied: bool
    tensors: frozenset[str] = frozenset()
    rope_divisors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """Value of `<architecture>.<key>`; without a default a missing one is a FormatError."""
        full = f"{self.metadata['general.architecture']}.{key}"
        if full in self.metadata:
            return self.metadata[full]
        if default is None:
            raise FormatError(f"GGUF metadata has no {full}")
        return default

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; a value per layer is an UnsupportedError, anything else a FormatError."""
        value = self.get(key, default)
        if isinstance(value, list):
            raise UnsupportedError(f"GGUF {key} with a value per layer is not supported (supported: one integer)")
        if isinstance(value, bool) or not isinstance(value, int):
            raise FormatError(f"GGUF {key} must be an integer, got {value!r}")
        return value

    def biases(self) -> dict[str, bool]:
        """The biases that the first layer has."""
        names = {"qkv_bias": "attn_q", "o_bias": "attn_output", "mlp_bias": "ffn_down"}
        return {ours: f"blk.0.{name}.bias" in self.tensors for ours, name in names.items()}

    def experts(self, score: str, **variant: Any) -> Moe:
        """The experts of its layers, whose `expert_gating_func` must be the one that `score` stands for."""
        wanted = GATING[score]
        if (kind := self.integer("expert_gating_func", wanted)) != wanted:
            raise UnsupportedError(f"GGUF expert_gating_func {kind} is not supported here (supported: {wanted})")
        return Moe(
            self.integer("expert_count"),
            self.integer("expert_used_count"),
            self.integer("expert_feed_forward_length", self.integer("feed_forward_length")),
            score=score,
            **variant,
        )

    def sparse(self, layers: int) -> tuple[bool, ...]:
        """For each layer whether it has experts."""
        return tuple(f"blk.{i}.ffn_gate_inp.weight" in self.tensors for i in range(layers))

    def ropes(self, head_dim: int, layers: int) -> dict[str, Any]:
        """Rotations, the same in every layer: fields of DenseConfig."""
        if "rope_factors_long.weight" not in self.rope_divisors:
            return {"ropes": (self.rope(head_dim),) * layers}
        theta, dim = self._turns(head_dim)
        scale = float(self.get("rope.scaling.attn_factor", 1.0))
        short, long = (
            longrope(theta, dim, self.rope_divisors.get(f"rope_factors_{name}.weight", ()), scale)
            for name in ("short", "long")
        )
        original = self.integer("rope.scaling.original_context_length")
        return {"ropes": (short,) * layers, "long_ropes": (long,) * layers, "short_context": original}

    def rope(self, head_dim: int, truncate: bool = True) -> Rope:
        """Rope of every layer that has no other. truncate: of YaRN, as `yarn_rope`."""
        (theta, dim), kind = self._turns(head_dim), self.get("rope.scaling.type", "none")
        if kind not in ("none", "linear", "yarn"):
            raise UnsupportedError(f"GGUF rope.scaling.type {kind!r} is not supported (supported: none, linear, yarn)")
        if kind == "yarn":
            return self._yarn(theta, dim, truncate)
        factor = float(self.get("rope.scaling.factor")) if kind == "linear" else 1.0
        divisors = self.rope_divisors.get("rope_freqs.weight")
        if divisors is not None:
            if len(divisors) != dim // 2:
                raise FormatError(f"rope_freqs.weight has {len(divisors)} values instead of {dim // 2}")
            return Rope(theta, dim, tuple(factor * divisor for divisor in divisors))
        return Rope(theta, dim) if kind == "none" else linear_rope(theta, dim, factor)

    def _turns(self, head_dim: int) -> tuple[float, int]:
        return float(self.get("rope.freq_base", 10000.0)), self.integer("rope.dimension_count", head_dim)

    def _yarn(self, theta: float, dim: int, truncate: bool) -> Rope:
        for key in ("yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"):
            if self.get(f"rope.scaling.{key}", 1.0) != 1.0:
                raise UnsupportedError(f"GGUF rope.scaling.{key} is not supported")
        factor, original = float(self.get("rope.scaling.factor")), self.integer("rope.scaling.original_context_length")
        scale = yarn_scale(factor) * float(self.get("rope.scaling.attn_factor", 1.0))
        fast, slow = (
            float(self.get(f"rope.scaling.yarn_beta_{name}", end)) for name, end in (("fast", 32.0), ("slow", 1.0))
        )
        return yarn_rope(theta, dim, factor, original, scale, fast, slow, truncate)


def gguf_config(meta: GGUFConfig, **variant: Any) -> DenseConfig:
    """From GGUF metadata; `variant` sets what the family does differently."""
    hidden, heads = (meta.integer(key) for key in ("embedding_length", "attention.head_count"))
    layers = variant.get("num_layers") or meta.integer("block_count")
    head_dim = meta.integer("attention.key_length", hidden // heads)
    fields: dict[str, Any] = {
        "vocab_size": meta.vocab_size,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "ff_size": meta.integer("feed_forward_length"),
        "norm_eps": float(meta.get("attention.layer_norm_rms_epsilon")),
        "context": meta.integer("context_length"),
        "windows": (0,) * layers,
        "attention_scale": head_dim**-0.5,
        "tied": meta.tied,
    }
    if "ropes" not in variant:
        fields |= meta.ropes(head_dim, layers)
    return DenseConfig(**fields | variant)
