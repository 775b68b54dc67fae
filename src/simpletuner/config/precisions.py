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
}

_SDNQ_REASON = "sdnq's layers stop the gradients of earlier layers without an error"
_DYNAMIC_REASON = "rounding activations as well makes the gradients wrong"
REFUSED_PRECISIONS: Mapping[str, str] = {
    "int2-quanto": "two bits lose too much of Chroma; nf4 is the smallest",
    "fp4-bnb": "fp4 has a third more error than nf4 at the same size; use nf4",
    "int8dq-torchao": f"{_DYNAMIC_REASON}; use int8",
    "int8dq-int4-torchao": f"{_DYNAMIC_REASON}; use int4",
    "fp8-int4-torchao": f"{_DYNAMIC_REASON}; use int4",
    "fp8-transformerengine": "fp8 matrix products are not supported; fp8 stores weights only",
    **dict.fromkeys(("int8-sdnq", "uint8-sdnq", "int6-sdnq"), f"{_SDNQ_REASON}; use int8"),
    **dict.fromkeys(("int5-sdnq", "uint5-sdnq", "uint4-sdnq"), f"{_SDNQ_REASON}; use nf4"),
    **dict.fromkeys(("uint3-sdnq", "uint2-sdnq"), f"{_SDNQ_REASON}; nf4 is the smallest"),
    **dict.fromkeys(("int16-sdnq", "uint16-sdnq", "fp16-sdnq"), f"{_SDNQ_REASON}; use no_change"),
    "fp8-sdnq": f"{_SDNQ_REASON}; use fp8",
}
