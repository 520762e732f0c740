"""Feed-forward blocks, as plain ops."""

from __future__ import annotations

from tokenspeed.program.recorder import Recorder, Scope, Value


def gated_mlp(g: Recorder, x: Value, w: Scope, act: str) -> Value:
    """down(act(gate x) * up x). Weights: gate_up [2 ff, d], down [d, ff]; optional gate_up_bias, down_bias."""
    gate_up = g.linear(x, w.gate_up, w.gate_up_bias if w.has("gate_up_bias") else None)
    return g.linear(g.act_mul(gate_up, act), w.down, w.down_bias if w.has("down_bias") else None)
