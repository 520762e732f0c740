"""What the dense decoder families share: one config type, readers of config.json and GGUF metadata, and the weight
table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.layers.attention import Attention
from tokenspeed.ops.rope import Rope, linear_rope, rope_from_hf
from tokenspeed.program.recorder import Recorder, Value
from tokenspeed.weights.spec import Kind, Source, Transform, WeightSpec, WeightTable


@dataclass(frozen=True)
class DenseConfig:
    """Sizes and variants of a dense decoder. ropes and windows have one entry per layer; window 0 is full attention."""

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
    qk_norm: bool = False
    post_norms: bool = False
    norm_plus_one: bool = False
    gguf_permuted: bool = False
    """Q and K rows of its GGUF files are interleaved within each head (llama-architecture files are)."""

    @property
    def q_size(self) -> int:
        """Columns of all query heads."""
        return self.num_heads * self.head_dim

    def attention(self, layer: int) -> Attention:
        """Attention of one layer."""
        return Attention(self.head_dim, self.ropes[layer], self.attention_scale, self.windows[layer], self.norm_eps)

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


def hf_config(config: Mapping[str, Any], **variant: Any) -> DenseConfig:
    """From config.json in the common names; `variant` sets what the family does differently."""
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
        "ropes": variant.get("ropes") or (hf_rope(config, head_dim),) * layers,
        "windows": (0,) * layers,
        "attention_scale": head_dim**-0.5,
        "tied": config.get("tie_word_embeddings", False),
    }
    return DenseConfig(**fields | variant)


def hf_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Rope of config.json, in the names of transformers 5 (rope_parameters) and before (rope_theta, rope_scaling)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    theta = (scaling or {}).get("rope_theta") or config.get("rope_theta", 10000.0)
    part = (scaling or {}).get("partial_rotary_factor") or config.get("partial_rotary_factor", 1.0)
    return rope_from_hf(float(theta), int(head_dim * part), scaling)


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


def refuse_other(config: Mapping[str, Any], key: str, wanted: str) -> None:
    """Raise UnsupportedError where config.json asks for another `key` than the one its family runs with."""
    if config.get(key) not in (None, wanted):
        raise UnsupportedError(f"{key} {config[key]!r} is not supported (supported: {wanted})")


@dataclass(frozen=True)
class GGUFConfig:
    """GGUF metadata of one architecture. rope_divisors: contents of the file's `rope_freqs.weight`, if it has one."""

    metadata: Mapping[str, Any]
    vocab_size: int
    tied: bool
    rope_divisors: tuple[float, ...] = ()

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

    def rope(self, head_dim: int) -> Rope:
        """Rope of every layer that has no other."""
        theta, kind = float(self.get("rope.freq_base", 10000.0)), self.get("rope.scaling.type", "none")
        dim = self.integer("rope.dimension_count", head_dim)
        if kind not in ("none", "linear"):
            raise UnsupportedError(f"GGUF rope.scaling.type {kind!r} is not supported (supported: none, linear)")
        factor = float(self.get("rope.scaling.factor")) if kind == "linear" else 1.0
        if self.rope_divisors:
            if len(self.rope_divisors) != dim // 2:
                raise FormatError(f"rope_freqs.weight has {len(self.rope_divisors)} values instead of {dim // 2}")
            return Rope(theta, dim, tuple(factor * divisor for divisor in self.rope_divisors))
        return Rope(theta, dim) if kind == "none" else linear_rope(theta, dim, factor)


def gguf_config(meta: GGUFConfig, **variant: Any) -> DenseConfig:
    """From GGUF metadata; `variant` sets what the family does differently."""
    hidden, heads, layers = (meta.integer(k) for k in ("embedding_length", "attention.head_count", "block_count"))
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
        "ropes": (meta.rope(head_dim),) * layers,
        "windows": (0,) * layers,
        "attention_scale": head_dim**-0.5,
        "tied": meta.tied,
    }
    return DenseConfig(**fields | variant)


class _Table:
    """Builds the weight table: a name of ours, the shape, and the names in both formats."""

    def __init__(self, cfg: DenseConfig) -> None:
        self.cfg = cfg
        self.table = WeightTable(ignored=("rope_freqs.weight", "*.rotary_emb.inv_freq"))

    def vector(self, name: str, hf: list[Source], gguf: list[Source]) -> None:
        size = sum(source.rows for source in hf)
        self.table.add(WeightSpec(name, (size,), "vector", tuple(hf), tuple(gguf)))

    def norm(self, name: str, size: int, hf: str, gguf: str) -> None:
        plus_one: Transform = "add_one" if self.cfg.norm_plus_one else "none"
        self.vector(name, [Source(f"{hf}.weight", size, plus_one)], [Source(f"{gguf}.weight", size)])

    def matrix(self, name: str, cols: int, hf: list[Source], gguf: list[Source], kind: Kind = "linear") -> None:
        rows = sum(source.rows for source in hf)
        self.table.add(WeightSpec(name, (rows, cols), kind, tuple(hf), tuple(gguf)))

    def plain(self, name: str, rows: int, cols: int, hf: str, gguf: str, kind: Kind = "linear") -> None:
        self.matrix(name, cols, [Source(f"{hf}.weight", rows)], [Source(f"{gguf}.weight", rows)], kind)


def dense_weights(cfg: DenseConfig) -> WeightTable:
    """Every weight of a dense decoder, with its names in both formats."""
    t = _Table(cfg)
    t.plain("embed", cfg.vocab_size, cfg.hidden_size, "model.embed_tokens", "token_embd", "embedding")
    for i in range(cfg.num_layers):
        _attention_weights(t, f"layers.{i}.", f"model.layers.{i}.", f"blk.{i}.")
        _mlp_weights(t, f"layers.{i}.", f"model.layers.{i}.", f"blk.{i}.")
    t.norm("final_norm", cfg.hidden_size, "model.norm", "output_norm")
    if cfg.tied:
        t.table.ignored += ("lm_head.weight",)
    else:
        t.plain("lm_head", cfg.vocab_size, cfg.hidden_size, "lm_head", "output")
    return t.table


def _attention_weights(t: _Table, ours: str, hf: str, gguf: str) -> None:
    cfg = t.cfg
    sizes = {"q": cfg.q_size, "k": cfg.kv_size, "v": cfg.kv_size}
    heads = {"q": cfg.num_heads, "k": cfg.num_kv_heads} if cfg.gguf_permuted else {}

    def sources(suffix: str) -> tuple[list[Source], list[Source]]:
        names = [Source(f"{hf}self_attn.{p}_proj.{suffix}", size) for p, size in sizes.items()]
        permuted = [
            Source(f"{gguf}attn_{p}.{suffix}", size, "unpermute_rope" if p in heads else "none", heads.get(p, 0))
            for p, size in sizes.items()
        ]
        return names, permuted

    t.norm(ours + "attn_norm", cfg.hidden_size, hf + "input_layernorm", gguf + "attn_norm")
    t.matrix(ours + "qkv", cfg.hidden_size, *sources("weight"))
    if cfg.qkv_bias:
        t.vector(ours + "qkv_bias", *sources("bias"))
    if cfg.qk_norm:
        for p in ("q", "k"):
            t.norm(f"{ours}{p}_norm", cfg.head_dim, f"{hf}self_attn.{p}_norm", f"{gguf}attn_{p}_norm")
    t.plain(ours + "o", cfg.hidden_size, cfg.q_size, hf + "self_attn.o_proj", gguf + "attn_output")
    if cfg.post_norms:
        t.norm(ours + "attn_post_norm", cfg.hidden_size, hf + "post_attention_layernorm", gguf + "post_attention_norm")


def _mlp_weights(t: _Table, ours: str, hf: str, gguf: str) -> None:
    cfg = t.cfg
    before = "pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm"
    t.norm(ours + "mlp_norm", cfg.hidden_size, hf + before, gguf + "ffn_norm")
    gate_up = [Source(f"{hf}mlp.{p}_proj.weight", cfg.ff_size) for p in ("gate", "up")]
    t.matrix(
        ours + "gate_up",
        cfg.hidden_size,
        gate_up,
        [Source(f"{gguf}ffn_{p}.weight", cfg.ff_size) for p in ("gate", "up")],
    )
    t.plain(ours + "down", cfg.hidden_size, cfg.ff_size, hf + "mlp.down_proj", gguf + "ffn_down")
    if cfg.post_norms:
        t.norm(ours + "mlp_post_norm", cfg.hidden_size, hf + "post_feedforward_layernorm", gguf + "post_ffw_norm")
