"""Chroma's modules under native names (the author's, ComfyUI's, kohya's) and diffusers' names.

A native matrix may hold several of diffusers', stacked along the rows, which are the outputs. The
columns (inputs) are the same on both sides: linear2 and proj_out both read [attention | mlp].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

# Native module -> diffusers' modules in the order of the native rows. {} is the block's number.
NATIVE_TO_DIFFUSERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "double_blocks.{}.img_attn.qkv": (
            "transformer_blocks.{}.attn.to_q",
            "transformer_blocks.{}.attn.to_k",
            "transformer_blocks.{}.attn.to_v",
        ),
        "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
        "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
        "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
        "double_blocks.{}.txt_attn.qkv": (
            "transformer_blocks.{}.attn.add_q_proj",
            "transformer_blocks.{}.attn.add_k_proj",
            "transformer_blocks.{}.attn.add_v_proj",
        ),
        "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
        "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
        "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
        "single_blocks.{}.linear1": (
            "single_transformer_blocks.{}.attn.to_q",
            "single_transformer_blocks.{}.attn.to_k",
            "single_transformer_blocks.{}.attn.to_v",
            "single_transformer_blocks.{}.proj_mlp",
        ),
        "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "final_layer.linear": ("proj_out",),
    }
)
MLP_RATIO = 4  # of Chroma at any width; used for files that adapt q, k, v of linear1 but not mlp
_BLOCK_NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")


def diffusers_names(native: str) -> tuple[str, ...]:
    """Return diffusers' modules of a native one, in the order of rows; empty if unknown."""
    template, number = split_block_number(native)
    return tuple(name.format(number) for name in NATIVE_TO_DIFFUSERS.get(template, ()))


def locate_in_native(diffusers: str) -> tuple[str, int] | None:
    """Return the native matrix that holds a module's rows, and the module's position in it."""
    template, number = split_block_number(diffusers)
    found = _DIFFUSERS_TO_NATIVE.get(template)
    return None if found is None else (found[0].format(number), found[1])


def underscores_to_dots(underscored: str, native: bool) -> str | None:
    """Return the dotted name: double_blocks_3_img_attn_qkv -> double_blocks.3.img_attn.qkv.

    native: the name is a native one, else diffusers'. None if unknown.
    """
    template, number = split_block_number(underscored)
    dotted = _BY_UNDERSCORED_NAME[native].get(template)
    return None if dotted is None else dotted.format(number)


def dots_to_underscores(name: str) -> str:
    """Return the name with underscores, as kohya's tools write it."""
    return name.replace(".", "_")


def fused_row_slices(parts: int, total: int, width: int) -> list[slice]:
    """Return the rows of each part in a native matrix of `total` rows.

    width: of the model, which is the number of columns of every qkv. q, k and v have as many rows
    as the model is wide; the remaining rows of linear1 are the mlp. Raises ValueError for
    impossible sizes.
    """
    if parts == 1:
        return [slice(0, total)]
    if total <= 3 * width if parts == 4 else total != 3 * width:
        raise ValueError(
            f"{total} rows cannot hold q, k, v{' and mlp' * (parts == 4)} of width {width}"
        )
    ends = [width, 2 * width, 3 * width, total][:parts]
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def split_block_number(name: str) -> tuple[str, str]:
    """Split off the block's number: ("double_blocks.{}.img_attn.qkv", "3")."""
    found = _BLOCK_NUMBER.search(name)
    return (
        (name, "")
        if found is None
        else (f"{name[: found.start()]}{{}}{name[found.end() :]}", found[0])
    )


_DIFFUSERS_TO_NATIVE = {
    part: (native, place)
    for native, parts in NATIVE_TO_DIFFUSERS.items()
    for place, part in enumerate(parts)
}
_BY_UNDERSCORED_NAME = {
    True: {dots_to_underscores(name): name for name in NATIVE_TO_DIFFUSERS},
    False: {dots_to_underscores(name): name for name in _DIFFUSERS_TO_NATIVE},
}
