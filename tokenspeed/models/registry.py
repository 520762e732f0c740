"""The families this version runs, and how a checkpoint or a shipped config finds its own."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.formats.checkpoint import Checkpoint
from tokenspeed.formats.gguf import GGUFFile
from tokenspeed.formats.quantized.modelopt import FILE as MODELOPT_FILE
from tokenspeed.formats.quantized.modelopt import METHOD as MODELOPT
from tokenspeed.formats.quantized.read import read_quantization
from tokenspeed.models import (
    gemma2,
    gemma3,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    llama,
    minimax_m2,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from tokenspeed.models.dense import DenseConfig, Family, GGUFConfig, size
from tokenspeed.models.dense_weights import dense_weights
from tokenspeed.program.program import Program
from tokenspeed.program.recorder import record
from tokenspeed.weights.spec import WeightTable, is_bare

FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY
    for module in (
        gemma2,
        gemma3,
        glm4,
        glm4_moe,
        gpt_oss,
        granite,
        llama,
        minimax_m2,
        mistral,
        mixtral,
        olmo2,
        phi3,
        qwen2,
        qwen3,
        qwen3_moe,
        smollm3,
    )
)
CLASSIFIER = "ForSequenceClassification"
CLASSIFIERS = ("gemma2", "gemma3", "glm4", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""Families that transformers gives such a head: the final norm's state of the last token, times `score.weight`."""
DEFAULT_LABELS = 2
"""Of transformers, which leaves that number out of config.json."""
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Of GGUF files: divisors of angles."""


@dataclass(frozen=True)
class Definition:
    """A model without its weights: family, config, weight table."""

    family: Family
    config: DenseConfig
    weights: WeightTable

    @property
    def stored_as(self) -> str:
        """How the checkpoint's matrices are quantised by its own config, in words; empty where they are not."""
        return "" if self.weights.quantization is None else self.weights.quantization.description

    @property
    def multiplies_fp8(self) -> bool:
        """Whether the checkpoint's own config makes products of e4m3."""
        return self.weights.quantization is not None and self.weights.quantization.fp8

    def program(self, adapters: Mapping[str, int] | None = None, capture: tuple[str, ...] = ()) -> Program:
        """The recorded program; `adapters` and `capture` as in Recorder."""
        shapes = {name: spec.shape for name, spec in self.weights.specs.items()}
        return record(lambda g: self.family.wire(g, self.config), shapes, adapters, capture)


def define_from_hf(
    config: Mapping[str, Any], length: int | None = None, tensors: Collection[str] | None = None
) -> Definition:
    """From the contents of config.json, for sequences of up to `length` tokens (`DenseConfig.opened`), and the names of
    the checkpoint's tensors. Raises UnsupportedError on an unknown model_type, listing the known ones, and on a
    quantization_config that is not read."""
    quantization = read_quantization(config)
    kind = config.get("model_type")
    for family in FAMILIES:
        if kind in family.hf_types:
            made = replace(family.from_hf(config), num_labels=_num_labels(config, family))
            if tensors and is_bare(tensors) and not (made.num_labels or made.tied or "lm_head.weight" in tensors):
                made = replace(made, tied=True, headless=True)
            definition = _define(family, made.opened(length))
            definition.weights.quantization = quantization
            return definition
    known = sorted(name for family in FAMILIES for name in family.hf_types)
    raise UnsupportedError(f"model_type {kind!r} is not supported (supported: {', '.join(known)})")


def _num_labels(config: Mapping[str, Any], family: Family) -> int:
    """Labels of a sequence-classification head, 0 for a language model."""
    named = [name for name in config.get("architectures") or () if name.endswith(CLASSIFIER)]
    if not named:
        return 0
    if family.name not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise UnsupportedError(f"architecture {named[0]!r} is not supported (classification heads of: {known})")
    if config.get("problem_type") == "multi_label_classification":
        raise UnsupportedError(f"{named[0]} with problem_type 'multi_label_classification' is not supported")
    labels = config.get("id2label") or {}
    return size(config, "num_labels", len(labels) or DEFAULT_LABELS)


def define_from_gguf(file: GGUFFile, length: int | None = None) -> Definition:
    """From a GGUF file's metadata and tensor list, `length` as above. Raises UnsupportedError on an unknown
    architecture."""
    kind = file.metadata.get("general.architecture")
    for family in FAMILIES:
        if kind in family.gguf_types:
            return _define(family, family.from_gguf(_gguf_view(file)).opened(length))
    known = sorted(name for family in FAMILIES for name in family.gguf_types)
    raise UnsupportedError(f"GGUF architecture {kind!r} is not supported (supported: {', '.join(known)})")


def define(checkpoint: Checkpoint, length: int | None = None) -> Definition:
    """The definition that fits an open checkpoint, `length` as above."""
    if isinstance(checkpoint, GGUFFile):
        return define_from_gguf(checkpoint, length)
    return define_from_hf(read_config(_directory(checkpoint.path)), length, checkpoint.tensors)


def shipped_configs() -> dict[str, Any]:
    """Configs that come with the package, by name: {"llama-3.1-8b": {...}, ...}."""
    folder = resources.files("tokenspeed.models") / "configs"
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".json")]
    return {
        entry.name.removesuffix(".json"): json.loads(entry.read_text()) for entry in sorted(files, key=lambda e: e.name)
    }


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json; its quantization_config may lie beside it, in a file of NVIDIA's Model Optimizer. Raises
    FormatError naming the file."""
    config, beside = read_json(folder / "config.json"), folder / MODELOPT_FILE
    if beside.is_file() and not config.get("quantization_config"):
        config["quantization_config"] = {"quant_method": MODELOPT} | read_json(beside)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises FormatError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: not a JSON object")
    return value


def _define(family: Family, config: DenseConfig) -> Definition:
    return Definition(family, config, dense_weights(config))


def _directory(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _gguf_view(file: GGUFFile) -> GGUFConfig:
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise FormatError(f"{file.path}: no tensor token_embd.weight")
    names = frozenset(file.tensors)
    divisors = {name: _divisors(file, name) for name in ROPE_TENSORS if name in names}
    return GGUFConfig(file.metadata, table.shape[0], "output.weight" not in names, names, divisors)


def _divisors(file: GGUFFile, name: str) -> tuple[float, ...]:
    if file.tensors[name].dtype != "F32":
        raise UnsupportedError(f"{file.path}: {name} must be F32")
    return tuple(file.data(name).view(np.float32).tolist())
