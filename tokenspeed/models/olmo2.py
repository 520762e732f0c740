"""OLMo 2: norms on the branches alone, and one on all query heads together and on all key heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed.layers.attention import attention_block
from tokenspeed.layers.decoder import decoder
from tokenspeed.layers.mlp import gated_mlp
from tokenspeed.models.dense import DenseConfig, Family, GGUFConfig, NormNames, gguf_config, hf_biases, hf_config
from tokenspeed.program.recorder import Recorder, Scope, Value

VARIANT: dict[str, Any] = {
    "norms": NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "qk_norm_whole": True,
}


def from_hf(config: Mapping[str, Any]) -> DenseConfig:
    """From config.json."""
    biases = hf_biases(config) | {"mlp_bias": False}
    return hf_config({"rms_norm_eps": 1e-5, **config}, **VARIANT, **biases)


def from_gguf(meta: GGUFConfig) -> DenseConfig:
    """From GGUF metadata."""
    return gguf_config(meta, **VARIANT, **meta.biases())


def wire(g: Recorder, cfg: DenseConfig) -> Value:
    """Attention and MLP read the residual stream itself; each has a norm after it on the branch."""

    def layer(x: Value, w: Scope, i: int) -> Value:
        x = g.add(x, g.norm(attention_block(g, x, w, i, cfg.attention(i)), w.attn_post_norm, eps=cfg.norm_eps))
        return g.add(x, g.norm(gated_mlp(g, x, w, cfg.act), w.mlp_post_norm, eps=cfg.norm_eps))

    return decoder(g, layer, num_layers=cfg.num_layers, eps=cfg.norm_eps)


FAMILY = Family("olmo2", ("olmo2",), ("olmo2",), from_hf, from_gguf, wire)
