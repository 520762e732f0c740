"""The frame of a decoder-only model: embedding, layers, final norm, head."""

from __future__ import annotations

from collections.abc import Callable

from tokenspeed.program.recorder import Recorder, Scope, Value


def decoder(
    g: Recorder,
    layer: Callable[[Value, Scope, int], Value],
    *,
    num_layers: int,
    eps: float,
    embed_scale: float = 1.0,
    logit_cap: float = 0.0,
) -> Value:
    """Logits of the selected rows. Weights: embed, layers.N.*, final_norm; the head is score, whose logits are those of
    labels and never capped, or lm_head, or embed where there is neither. logit_cap: logits x become
    logit_cap * tanh(x / logit_cap); 0 leaves them."""
    top = g.weights()
    x = g.embed(g.tokens, top.embed, scale=embed_scale)
    for i in range(num_layers):
        x = layer(x, g.weights(f"layers.{i}."), i)
    states = g.norm(g.select(x), top.final_norm, eps=eps)
    if top.has("score"):
        return g.linear(states, top.score)
    logits = g.linear(states, top.lm_head if top.has("lm_head") else top.embed)
    return g.softcap(logits, logit_cap) if logit_cap else logits
