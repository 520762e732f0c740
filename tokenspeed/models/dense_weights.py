"""The weight table of a decoder: every weight, its shape, and its names in both formats."""

from __future__ import annotations

from tokenspeed.models.dense import DenseConfig
from tokenspeed.models.moe_weights import moe_weights
from tokenspeed.models.table import Table
from tokenspeed.weights.spec import Source, WeightTable


def dense_weights(cfg: DenseConfig) -> WeightTable:
    """Every weight of a decoder, with its names in both formats.

    A divisor of the logits goes into the final norm, whose weights are float32.
    """
    t = Table(cfg)
    t.plain("embed", cfg.vocab_size, cfg.hidden_size, "model.embed_tokens", "token_embd", "embedding")
    for i in range(cfg.num_layers):
        _attention_weights(t, f"layers.{i}.", f"model.layers.{i}.", f"blk.{i}.")
        _mlp_weights(t, i, f"layers.{i}.", f"model.layers.{i}.", f"blk.{i}.")
    for i in range(cfg.num_layers, cfg.num_layers + cfg.later_layers):
        t.table.ignored += (f"model.layers.{i}.*", f"blk.{i}.*")
    t.norm("final_norm", cfg.hidden_size, "model.norm", "output_norm", factor=1.0 / cfg.logits_divisor)
    if cfg.num_labels:
        t.plain("score", cfg.num_labels, cfg.hidden_size, "score", "cls.output")
    elif cfg.tied:
        t.table.ignored += ("lm_head.weight",)
    else:
        t.plain("lm_head", cfg.vocab_size, cfg.hidden_size, "lm_head", "output")
    return t.table


def _attention_weights(t: Table, ours: str, hf: str, gguf: str) -> None:
    cfg = t.cfg
    if cfg.norms.attn:
        t.norm(ours + "attn_norm", cfg.hidden_size, hf + cfg.norms.attn, gguf + "attn_norm")
    t.matrix(ours + "qkv", cfg.hidden_size, *_qkv_sources(cfg, hf, gguf, "weight"))
    if cfg.qkv_bias:
        t.vector(ours + "qkv_bias", *_qkv_sources(cfg, hf, gguf, "bias"))
    if cfg.qk_norm or cfg.qk_norm_whole:
        for p, size in (("q", cfg.q_size), ("k", cfg.kv_size)):
            width = cfg.head_dim if cfg.qk_norm else size
            t.norm(f"{ours}{p}_norm", width, f"{hf}self_attn.{p}_norm", f"{gguf}attn_{p}_norm")
    if cfg.sinks:
        t.vector(
            ours + "sinks",
            [Source(hf + "self_attn.sinks", cfg.num_heads)],
            [Source(gguf + "attn_sinks.weight", cfg.num_heads)],
        )
    t.plain(ours + "o", cfg.hidden_size, cfg.q_size, hf + "self_attn.o_proj", gguf + "attn_output", bias=cfg.o_bias)
    if cfg.norms.attn_post:
        t.norm(ours + "attn_post_norm", cfg.hidden_size, hf + cfg.norms.attn_post, gguf + "post_attention_norm")


def _qkv_sources(cfg: DenseConfig, hf: str, gguf: str, suffix: str) -> tuple[list[Source], list[Source]]:
    """In config.json's names and in GGUF's. A fused tensor is never interleaved."""
    if "qkv" in cfg.fused:
        rows = cfg.q_size + 2 * cfg.kv_size
        return [Source(f"{hf}self_attn.qkv_proj.{suffix}", rows)], [Source(f"{gguf}attn_qkv.{suffix}", rows)]
    sizes = {"q": cfg.q_size, "k": cfg.kv_size, "v": cfg.kv_size}
    turned = cfg.ropes[0].dim if cfg.ropes[0].dim < cfg.head_dim else 0

    def source(name: str, part: str, interleaved: bool) -> Source:
        if not interleaved or part == "v":
            return Source(name, sizes[part])
        return Source(name, sizes[part], "unpermute_rope", sizes[part] // cfg.head_dim, turned)

    return (
        [source(f"{hf}self_attn.{part}_proj.{suffix}", part, cfg.interleaved) for part in sizes],
        [source(f"{gguf}attn_{part}.{suffix}", part, cfg.interleaved or cfg.gguf_permuted) for part in sizes],
    )


def _mlp_weights(t: Table, layer: int, ours: str, hf: str, gguf: str) -> None:
    cfg = t.cfg
    if cfg.norms.mlp:
        t.norm(ours + "mlp_norm", cfg.hidden_size, hf + cfg.norms.mlp, gguf + cfg.gguf_mlp_norm)
    if cfg.moe is not None and cfg.sparse[layer]:
        moe_weights(t, cfg.moe, ours, hf, gguf)
    else:
        _gated_mlp_weights(t, ours, hf, gguf)
    if cfg.norms.mlp_post:
        t.norm(ours + "mlp_post_norm", cfg.hidden_size, hf + cfg.norms.mlp_post, gguf + "post_ffw_norm")


def _gated_mlp_weights(t: Table, ours: str, hf: str, gguf: str) -> None:
    cfg = t.cfg
    t.matrix(ours + "gate_up", cfg.hidden_size, *_gate_up_sources(cfg, hf, gguf, "weight"))
    if cfg.mlp_bias:
        t.vector(ours + "gate_up_bias", *_gate_up_sources(cfg, hf, gguf, "bias"))
    t.plain(ours + "down", cfg.hidden_size, cfg.ff_size, hf + "mlp.down_proj", gguf + "ffn_down", bias=cfg.mlp_bias)


def _gate_up_sources(cfg: DenseConfig, hf: str, gguf: str, suffix: str) -> tuple[list[Source], list[Source]]:
    if "gate_up" in cfg.fused:
        rows = 2 * cfg.ff_size
        return [Source(f"{hf}mlp.gate_up_proj.{suffix}", rows)], [Source(f"{gguf}ffn_up.{suffix}", rows)]
    return (
        [Source(f"{hf}mlp.{part}_proj.{suffix}", cfg.ff_size) for part in ("gate", "up")],
        [Source(f"{gguf}ffn_{part}.{suffix}", cfg.ff_size) for part in ("gate", "up")],
    )
