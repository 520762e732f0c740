"""From the quantization_config of a config.json to how its checkpoint keeps matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.formats.quantized.awq import read_awq
from tokenspeed.formats.quantized.compressed_tensors import read_compressed_tensors
from tokenspeed.formats.quantized.fp8 import read_fp8
from tokenspeed.formats.quantized.gptq import read_gptq
from tokenspeed.formats.quantized.layout import Quantization
from tokenspeed.formats.quantized.modelopt import read_modelopt
from tokenspeed.formats.quantized.mxfp4 import read_mxfp4

READERS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
    "fp8": read_fp8,
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_awq,
    "modelopt": read_modelopt,
    "mxfp4": read_mxfp4,
}


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """From the contents of config.json; None where its matrices are not quantised. Raises UnsupportedError for a method
    or a setting that is not read, FormatError for one that makes no sense."""
    given = config.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, dict):
        raise FormatError("quantization_config must be an object")
    method = given.get("quant_method")
    if method not in READERS:
        raise UnsupportedError(f"quantization_config {method!r} is not supported (supported: {', '.join(READERS)})")
    found = READERS[method](given)
    return replace(found, layout_of=cache(found.layout_of))  # asked for often, of thousands of experts
