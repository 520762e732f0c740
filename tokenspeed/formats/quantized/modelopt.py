"""Checkpoints of NVIDIA's Model Optimizer: fp8 with a scale per matrix, and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from tokenspeed.formats.quantized import nvfp4
from tokenspeed.formats.quantized.fp8 import STATIC, Fp8Layout, is_kept
from tokenspeed.formats.quantized.layout import Layout, Quantization, names, refuse

METHOD = "modelopt"
FILE = "hf_quant_config.json"
"""Where older checkpoints have what others have in config.json."""
_LAYOUTS: dict[str, Layout] = {"FP8": Fp8Layout("tensor"), "NVFP4": nvfp4.MODELOPT}


def read_modelopt(config: Mapping[str, Any]) -> Quantization:
    """From a quantization_config of quant_method "modelopt", whose settings may lie under `quantization`. Raises
    UnsupportedError for other algorithms."""
    given = config.get("quantization", config)
    algorithm = given.get("quant_algo")
    if algorithm not in _LAYOUTS:
        raise refuse(METHOD, "quant_algo", algorithm, ", ".join(_LAYOUTS))
    if algorithm == "NVFP4" and given.get("group_size") not in (None, nvfp4.BLOCK):
        raise refuse(METHOD, "group_size", given["group_size"], str(nvfp4.BLOCK))
    layout = _LAYOUTS[algorithm]
    kept = frozenset(names(given, METHOD, "exclude_modules") + names(given, METHOD, "ignore"))
    return Quantization(
        METHOD,
        lambda module: None if _is_kept(module, kept) else layout,
        f"{METHOD} {layout}",
        algorithm == "FP8",
        ("*.input_scale",),
        (STATIC,),
    )


def _is_kept(module: str, kept: frozenset[str]) -> bool:
    return is_kept(module, kept) or any(fnmatchcase(module, pattern) for pattern in kept)
