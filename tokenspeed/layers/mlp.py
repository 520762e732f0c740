"""Feed-forward blocks, as plain ops."""

from __future__ import annotations

from tokenspeed.program.recorder import Recorder, Scope, Value


def gated_mlp(g: Recorder, x: Value, w: Scope, act: str) -> Value:
    """down(act(gate x) * up x). Weights: gate_up [2 ff, d], down [d, ff]."""
    return g.linear(g.act_mul(g.linear(x, w.gate_up), act), w.down)
