"""One layer of a step's paged KV, and what both attention kernels do with a block of keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tokenspeed.kernels.triton.view import PagedView
from tokenspeed.ops.definitions import UNSCALED, Attrs, KvScale


class PagedLayer(NamedTuple):
    """kv: [pages, 2, page_size, kv_heads, head_dim], a view of the arena. table: int32 [slots, pages] of the layer's
    group. positions, slots: int32 [T]."""

    kv: torch.Tensor
    table: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor


def paged_layer(view: PagedView, layer: int) -> PagedLayer:
    """The pages of one layer and the table that names them."""
    group, index = view.places[layer]
    return PagedLayer(view.kv[:, index], view.block_tables[group], view.positions, view.slots)


class Heads(NamedTuple):
    """Shape of an attention: grouped queries, softmax scale, window and soft cap of scores (0 for none), and what the
    cache's keys and values are to be multiplied by."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float = 0.0
    kv_scale: KvScale = UNSCALED

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def key_scale(self) -> float:
        """From queries times stored keys to scores in log 2."""
        return self.scale * self.kv_scale.key * LOG2E.value


def heads_of(attrs: Attrs) -> Heads:
    """From the attributes of an attention record."""
    names = ("heads", "kv_heads", "head_dim", "scale", "window", "softcap")
    return Heads(*(attrs[name] for name in names))._replace(kv_scale=attrs.get("kv_scale", UNSCALED))


LOG2E = tl.constexpr(math.log2(math.e))
"""Scores are kept in units of log 2, where the exponential is one instruction."""


@triton.jit
def entries(table, key, live, kv_page, kv_entry, PAGE: tl.constexpr):
    """Offsets int64 of the pages' entries of keys at positions `key`; tables are not read where they are not live."""
    page = tl.load(table + key // PAGE, mask=live, other=0)
    return page.to(tl.int64) * kv_page + (key % PAGE) * kv_entry


@triton.jit
def absorb(acc, top, total, scores, value):
    """One block of online softmax (arXiv:2205.14135): scores [rows, keys] in log 2, value [keys, dim].

    acc is the sum of 2^(score - top) * value, total that of 2^(score - top), both float32.
    """
    highest = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen no key yet must not give inf - inf.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, highest, total


@triton.jit
def capped(scores, CAP: tl.constexpr):
    """CAP * tanh(scores / CAP); both in log 2."""
    return CAP - 2 * CAP / (1 + tl.exp(scores * (2 / CAP)))


@triton.jit
def sweep(acc, top, total, queries, position, lowest, begin, end, first, last, pages, keys, scale,
           kv_page, kv_which, kv_entry, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr,
           KEYS: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Blocks [first, last) of keys; where not MASKED every query sees all of them. CAP: 0 for none."""
    d = tl.arange(0, DIM_PAD)
    for i in range(first, last):
        n = i * KEYS + tl.arange(0, KEYS)
        if MASKED:
            seen = (n >= begin) & (n < end)
            offsets = entries(pages, n, seen, kv_page, kv_entry, PAGE)[:, None] + d[None, :]
            inside = seen[:, None] & (d < DIM)[None, :]
            key = tl.load(keys + offsets, mask=inside, other=0.0).to(queries.dtype)
            value = tl.load(keys + kv_which + offsets, mask=inside, other=0.0).to(queries.dtype)
        else:
            page = tl.load(pages + n // PAGE).to(tl.int64)
            offsets = (page * kv_page + (n % PAGE) * kv_entry)[:, None] + d[None, :]
            if DIM_PAD == DIM:
                key = tl.load(keys + offsets).to(queries.dtype)
                value = tl.load(keys + kv_which + offsets).to(queries.dtype)
            else:
                inside = (d < DIM)[None, :]
                key = tl.load(keys + offsets, mask=inside, other=0.0).to(queries.dtype)
                value = tl.load(keys + kv_which + offsets, mask=inside, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        if CAP > 0:
            scores = capped(scores, CAP)
        if MASKED:
            visible = (n[None, :] <= position[:, None]) & (n[None, :] > lowest[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        acc, top, total = absorb(acc, top, total, scores, value)
    return acc, top, total


@triton.jit
def finish(acc, top, total, sinks, heads, live, SINKS: tl.constexpr):
    """acc / total, with each head's sink logit in the total where there are sinks; zeros for a row without keys."""
    if SINKS:
        sink = tl.load(sinks + heads, mask=live, other=0) * LOG2E
        highest = tl.maximum(top, sink)
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.exp2(sink - highest)
        acc = acc * shrink[:, None]
    return acc / tl.where(total > 0, total, 1.0)[:, None]
