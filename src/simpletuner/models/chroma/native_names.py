"""All tensors of the transformer under native and diffusers' names.

`module_names` holds the matrices of the blocks. Conversion only renames tensors and slices
rows, so it is exact in both directions, at any width and depth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from types import MappingProxyType

from simpletuner.adapters.module_names import split_block_number
from simpletuner.errors import ModelError
from simpletuner.models.chroma.module_names import CHROMA_MODULE_NAMES
from simpletuner.models.chroma.transformer_config import MAX_LAYERS, TransformerConfig

_APPROXIMATOR = "distilled_guidance_layer"
# Native tensor -> diffusers' tensor. {} is the number of the block or of the approximator's layer.
NATIVE_TO_DIFFUSERS_TENSORS: Mapping[str, str] = MappingProxyType(
    {
        **{
            f"double_blocks.{{}}.{native}_norm.scale": (
                f"transformer_blocks.{{}}.attn.{diffusers}.weight"
            )
            for native, diffusers in (
                ("img_attn.norm.query", "norm_q"),
                ("img_attn.norm.key", "norm_k"),
                ("txt_attn.norm.query", "norm_added_q"),
                ("txt_attn.norm.key", "norm_added_k"),
            )
        },
        "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
        "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
        "distilled_guidance_layer.norms.{}.scale": "distilled_guidance_layer.norms.{}.weight",
        **{
            f"{_APPROXIMATOR}.{native}.{part}": f"{_APPROXIMATOR}.{diffusers}.{part}"
            for part in ("weight", "bias")
            for native, diffusers in (
                ("in_proj", "in_proj"),
                ("out_proj", "out_proj"),
                ("layers.{}.in_layer", "layers.{}.linear_1"),
                ("layers.{}.out_layer", "layers.{}.linear_2"),
            )
        },
    }
)
_DIFFUSERS_TO_NATIVE_TENSORS = {
    diffusers: native for native, diffusers in NATIVE_TO_DIFFUSERS_TENSORS.items()
}
# Metadata key of the config fields that cannot be inferred from tensor shapes.
CONFIG_METADATA_KEY = "transformer_config"


def split_native_tensor(native: str, rows: int, width: int) -> list[tuple[str, slice]]:
    """Return diffusers' tensors in a native one with their rows; empty for an unknown name.

    width: of the model. Raises ModelError when the number of rows is impossible.
    """
    template, number = split_block_number(native)
    if template in NATIVE_TO_DIFFUSERS_TENSORS:
        return [(NATIVE_TO_DIFFUSERS_TENSORS[template].format(number), slice(0, rows))]
    module, _, part = native.rpartition(".")
    names = CHROMA_MODULE_NAMES.diffusers_names(module) if part in ("weight", "bias") else ()
    if not names:
        return []
    try:
        slices = CHROMA_MODULE_NAMES.fused_row_slices(module, rows, width)
    except ValueError as error:
        raise ModelError(f"{native}: {error}.") from None
    return [
        (f"{name}.{part}", rows_of_part) for name, rows_of_part in zip(names, slices, strict=True)
    ]


def group_by_native_name(diffusers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return native tensor -> its diffusers' parts in the order of rows.

    Raises ModelError for a tensor that Chroma does not have, or when a part is missing.
    """
    names = list(dict.fromkeys(diffusers))
    groups: dict[str, tuple[str, ...]] = {}
    for name in names:
        template, number = split_block_number(name)
        module, _, part = name.rpartition(".")
        location = (
            CHROMA_MODULE_NAMES.locate_in_native(module) if part in ("weight", "bias") else None
        )
        if template in _DIFFUSERS_TO_NATIVE_TENSORS:
            groups[_DIFFUSERS_TO_NATIVE_TENSORS[template].format(number)] = (name,)
        elif location is not None:
            groups[f"{location[0]}.{part}"] = tuple(
                f"{module_part}.{part}"
                for module_part in CHROMA_MODULE_NAMES.diffusers_names(location[0])
            )
        else:
            raise ModelError(f"{name} is not a tensor of Chroma's transformer.")
    if missing := {part for parts in groups.values() for part in parts} - set(names):
        raise ModelError(
            f"{', '.join(sorted(missing)[:8])}: missing, although other parts of the same native"
            " tensor are present."
        )
    return groups


def config_metadata(config: TransformerConfig) -> dict[str, str]:
    """Return metadata for a native file's header with the config, parts of which have no shape."""
    return {CONFIG_METADATA_KEY: json.dumps(asdict(config), sort_keys=True)}


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], where: str
) -> TransformerConfig:
    """Return the config from a file's metadata, or infer it from the shapes of diffusers' names.

    The axes of the rotary embedding leave no trace in shapes; without metadata they get Chroma's
    proportions.
    """
    if CONFIG_METADATA_KEY in metadata:
        try:
            raw = json.loads(metadata[CONFIG_METADATA_KEY])
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict):
            raise ModelError(f"{where}: {CONFIG_METADATA_KEY} in its header is not a JSON object.")
        return TransformerConfig.from_dict(raw, where)
    layers = {
        kind: len({split_block_number(name)[1] for name in shapes if name.startswith(f"{kind}.")})
        for kind in (
            "transformer_blocks",
            "single_transformer_blocks",
            "distilled_guidance_layer.layers",
        )
    }
    try:
        width, channels = shapes["x_embedder.weight"]
        (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
        _, text_width = shapes["context_embedder.weight"]
        approximator_width, code_channels = shapes["distilled_guidance_layer.in_proj.weight"]
    except KeyError as error:
        raise ModelError(
            f"{where} is not a complete Chroma transformer: {error.args[0]} is missing."
        ) from None
    except ValueError:
        raise ModelError(
            f"{where}: an embedder or query norm has the wrong number of dimensions."
        ) from None
    if not head_dim or width % head_dim or head_dim % 32 or max(layers.values()) > MAX_LAYERS:
        raise ModelError(f"{where}: width {width}, heads of {head_dim}, {layers} are not a Chroma.")
    return TransformerConfig(
        in_channels=channels,
        num_layers=layers["transformer_blocks"],
        num_single_layers=layers["single_transformer_blocks"],
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        joint_attention_dim=text_width,
        axes_dims_rope=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
        approximator_num_channels=code_channels,
        approximator_hidden_dim=approximator_width,
        approximator_layers=layers["distilled_guidance_layer.layers"],
    )
