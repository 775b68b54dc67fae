"""Quantization schemes of a frozen base, and other libraries' names for them.

No library is called: our schemes have the same codes (nf4), or are at least as accurate at the same
size, with exact gradients. bitsandbytes' NF4 kernel multiplies unrounded levels, so a fifth of the
weights would differ from ours by one rounding. torchao keeps dequantized weights for the backward
pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Precision = Literal["no_change", "int8", "int4", "nf4", "fp8"]

PRECISION_ALIASES: Mapping[str, Precision] = {
    "none": "no_change",
    "bf16": "no_change",
    "int8-quanto": "int8",
    "int8-torchao": "int8",
    "int8-bnb": "int8",
    "int4-quanto": "int4",
    "int4-torchao": "int4",
    "nf4-bnb": "nf4",
    "nf4-torchao": "nf4",
    "fp8-quanto": "fp8",
    "fp8uz-quanto": "fp8",
    "fp8-torchao": "fp8",
    "fp8wo-torchao": "fp8",
    "fp8-native": "fp8",
    "fp8-transformerengine": "fp8",
    # Only the weights are quantized here: rounding activations as well makes gradients wrong.
    "int8dq-torchao": "int8",
    "int8dq-int4-torchao": "int4",
    "fp8-int4-torchao": "int4",
    "fp4-bnb": "nf4",  # fp4 has a third more error than nf4 at the same size
    # Sizes that are not here are read as the next larger one.
    **dict.fromkeys(("int8-sdnq", "uint8-sdnq", "int6-sdnq", "int5-sdnq", "uint5-sdnq"), "int8"),
    "uint4-sdnq": "int4",
    "fp8-sdnq": "fp8",
    **dict.fromkeys(("int16-sdnq", "uint16-sdnq", "fp16-sdnq"), "no_change"),
}

_TOO_SMALL_REASON = "{} bits lose too much of Chroma; nf4 is the smallest"
REFUSED_PRECISIONS: Mapping[str, str] = {
    "int2-quanto": _TOO_SMALL_REASON.format("two"),
    "uint2-sdnq": _TOO_SMALL_REASON.format("two"),
    "uint3-sdnq": _TOO_SMALL_REASON.format("three"),
}
