"""The chosen experts of one layer in the C++ walk: bytes over time, beside a dense projection of as many bytes.

`python -m tokenspeed.bench.cpu_experts --format Q4_K --threads 1`. By default Qwen3-30B-A3B's layer with 64 experts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenspeed.bench.stats import PairedResult, paired
from tokenspeed.formats.blocks import BLOCKS, row_bytes
from tokenspeed.runner.packing import pack_weights
from tokenspeed.weights.dummy import dummy_weights
from tokenspeed.weights.spec import WeightSpec, WeightTable

if TYPE_CHECKING:
    from tokenspeed.kernels.cpu import _walk


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer: all experts, those that a token chooses, columns in and between. A dense projection has the
    rows of as many experts as are chosen; there are as many of them as it takes to hold all experts, used by turns."""

    experts: int
    chosen: int
    hidden: int
    ff: int
    fmt: str

    @property
    def nbytes(self) -> int:
        """That one token reads."""
        per_expert = 2 * self.ff * row_bytes(self.fmt, self.hidden) + self.hidden * row_bytes(self.fmt, self.ff)
        return self.chosen * per_expert

    @property
    def turns(self) -> int:
        """Choices without an expert in common."""
        return self.experts // self.chosen

    def table(self) -> WeightTable:
        """The experts and the dense projections."""
        made = WeightTable()
        made.add(WeightSpec("gate_up", (self.experts, 2 * self.ff, self.hidden), "experts", (), ()))
        made.add(WeightSpec("down", (self.experts, self.hidden, self.ff), "experts", (), ()))
        for turn in range(self.turns):
            made.add(WeightSpec(f"gate_up.{turn}", (self.chosen * 2 * self.ff, self.hidden), "linear", (), ()))
            made.add(WeightSpec(f"down.{turn}", (self.chosen * self.hidden, self.ff), "linear", (), ()))
        return made


class Bench:
    """Both ways, packed in one walk."""

    def __init__(self, layer: Layer, threads: int) -> None:
        from tokenspeed.kernels.cpu import _walk

        self.layer, self._walk = layer, _walk
        self._native = _walk.Model(threads)
        weights = dummy_weights(layer.table(), layer.fmt)
        self._handles = pack_weights(self._native, weights, set(), None, _walk.LAYOUT_VERSION, None)
        self._op = self._experts_op()
        rng = np.random.default_rng(0)
        self._x, self._between = (rng.normal(size=(1, n)).astype(np.float32) for n in (layer.hidden, layer.ff))
        self._shares = np.full((1, layer.chosen), 1 / layer.chosen, np.float32)

    def _experts_op(self) -> _walk.Op:
        layer, native = self.layer, self._native
        op = self._walk.Op(self._walk.Kind.Experts)
        widths = (layer.hidden, layer.hidden, layer.chosen, layer.chosen)
        op.x, op.out, op.ids, op.shares = (native.add_value(i, 0, width, width) for i, width in enumerate(widths))
        op.experts = native.add_experts(self._handles.experts["gate_up"], self._handles.experts["down"])
        op.k, op.act = layer.chosen, 0
        return op

    def experts(self, turn: int) -> None:
        """One token through the experts of a turn."""
        first, op = turn % self.layer.turns * self.layer.chosen, self._op
        ids = np.arange(first, first + self.layer.chosen, dtype=np.int32)[None]
        inputs: list[tuple[int, Any]] = [(op.x, self._x), (op.ids, ids.view(np.float32)), (op.shares, self._shares)]
        self._native.run_alone(op, inputs, [(op.out, np.empty_like(self._x))])

    def dense(self, turn: int) -> None:
        """As many bytes by two dense projections."""
        turn %= self.layer.turns
        for name, x, rows in (("gate_up", self._x, 2 * self.layer.ff), ("down", self._between, self.layer.hidden)):
            out = np.empty((1, self.layer.chosen * rows), np.float32)
            self._native.multiply(self._handles.matrices[f"{name}.{turn}"], x, out)


def measure(bench: Bench, runs: int, tokens: int) -> PairedResult:
    """Seconds per token, experts and dense, in alternating runs."""
    return paired(lambda: _seconds(bench.experts, tokens), lambda: _seconds(bench.dense, tokens), runs)


def _seconds(way: Callable[[int], None], tokens: int) -> float:
    start = time.perf_counter()
    for turn in range(tokens):
        way(turn)
    return (time.perf_counter() - start) / tokens


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per format."""
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.bench.cpu_experts", description=__doc__)
    parser.add_argument("--format", choices=BLOCKS, nargs="+", default=["BF16", "Q8_0", "Q6_K", "Q4_K"])
    parser.add_argument("--threads", type=int, default=1)
    for name, value in (("experts", 64), ("chosen", 8), ("hidden", 2048), ("ff", 768), ("runs", 7), ("tokens", 40)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    for fmt in options.format:
        layer = Layer(options.experts, options.chosen, options.hidden, options.ff, fmt)
        result = measure(Bench(layer, options.threads), options.runs, options.tokens)
        experts, dense = (layer.nbytes / 1e9 / median(seconds) for seconds in (result.a, result.b))
        ratios = sorted(1 / ratio for ratio in result.ratios())
        print(
            f"{fmt}, {options.threads} threads, {layer.nbytes / 1e6:.1f} MB a token: experts {experts:.1f} GB/s, dense "
            f"{dense:.1f} GB/s, ratio {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}, {len(ratios)} pairs)"
        )


if __name__ == "__main__":
    main()
