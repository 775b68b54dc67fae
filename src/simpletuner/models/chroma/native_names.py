"""The whole transformer under both its names; the matrices of the blocks are in `adapters.names`.

Pure renaming and cutting by rows, so both ways are exact to the bit, at any width and depth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from types import MappingProxyType

from simpletuner.adapters.module_names import (
    diffusers_names,
    fused_row_slices,
    locate_in_native,
    split_block_number,
)
from simpletuner.errors import ModelError
from simpletuner.models.chroma.transformer import MAX_LAYERS, TransformerConfig

# native -> diffusers', whole tensors. {} is the number of the block or of the approximator's layer.
NATIVE_TO_DIFFUSERS_TENSORS: Mapping[str, str] = MappingProxyType(
    {
        "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q.weight",
        "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k.weight",
        "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q.weight",
        "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k.weight",
        "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
        "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
        "distilled_guidance_layer.norms.{}.scale": "distilled_guidance_layer.norms.{}.weight",
        **{
            f"distilled_guidance_layer.{native}.{part}": f"distilled_guidance_layer.{diffusers}.{part}"
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
# A safetensors file's own word on what its shapes cannot tell.
CONFIG_METADATA_KEY = "transformer_config"


def split_native_tensor(native: str, rows: int, width: int) -> list[tuple[str, slice]]:
    """Diffusers' tensors in a native one with their rows; nothing for a name that Chroma has not.

    width: of the model. ModelError where the rows cannot be those.
    """
    template, number = split_block_number(native)
    if template in NATIVE_TO_DIFFUSERS_TENSORS:
        return [(NATIVE_TO_DIFFUSERS_TENSORS[template].format(number), slice(0, rows))]
    module, _, part = native.rpartition(".")
    names = diffusers_names(module) if part in ("weight", "bias") else ()
    if not names:
        return []
    try:
        slices = fused_row_slices(len(names), rows, width)
    except ValueError as error:
        raise ModelError(f"{native}: {error}.") from None
    return [(f"{name}.{part}", each) for name, each in zip(names, slices, strict=True)]


def group_by_native_name(diffusers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The native tensors that hold all these, each with its parts in the order of rows.

    ModelError for what is no tensor of Chroma's transformer, or a part whose neighbours are missing.
    """
    names = list(dict.fromkeys(diffusers))
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        template, number = split_block_number(name)
        module, _, part = name.rpartition(".")
        place = locate_in_native(module) if part in ("weight", "bias") else None
        if template in _DIFFUSERS_TO_NATIVE_TENSORS:
            found[_DIFFUSERS_TO_NATIVE_TENSORS[template].format(number)] = (name,)
        elif place is not None:
            found[f"{place[0]}.{part}"] = tuple(
                f"{one}.{part}" for one in diffusers_names(place[0])
            )
        else:
            raise ModelError(f"{name} is no tensor of Chroma's transformer.")
    if alone := {part for together in found.values() for part in together} - set(names):
        raise ModelError(f"{', '.join(sorted(alone)[:8])}: missing beside their neighbours.")
    return found


def config_metadata(config: TransformerConfig) -> dict[str, str]:
    """For a native file's header, so that it says what its shapes cannot."""
    return {CONFIG_METADATA_KEY: json.dumps(asdict(config), sort_keys=True)}


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], told: Mapping[str, str], where: str
) -> TransformerConfig:
    """From the shapes of diffusers' names, or from the header where it says. told: the file's metadata.

    The three rotary axes leave no trace in shapes; without a word they have Chroma's proportions.
    """
    if CONFIG_METADATA_KEY in told:
        try:
            raw = json.loads(told[CONFIG_METADATA_KEY])
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict):
            raise ModelError(f"{where}: {CONFIG_METADATA_KEY} in its header is no JSON object.")
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
        (head,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
        _, text = shapes["context_embedder.weight"]
        hidden, code = shapes["distilled_guidance_layer.in_proj.weight"]
    except KeyError as error:
        raise ModelError(
            f"{where} is no whole Chroma transformer: missing {error.args[0]}."
        ) from None
    except ValueError:
        raise ModelError(
            f"{where}: an embedder or a query norm has the wrong number of dimensions."
        ) from None
    if not head or width % head or head % 32 or max(layers.values()) > MAX_LAYERS:
        raise ModelError(f"{where}: width {width}, heads of {head}, {layers} are not a Chroma.")
    return TransformerConfig(
        in_channels=channels,
        num_layers=layers["transformer_blocks"],
        num_single_layers=layers["single_transformer_blocks"],
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=text,
        axes_dims_rope=(head // 8, head * 7 // 16, head * 7 // 16),
        approximator_num_channels=code,
        approximator_hidden_dim=hidden,
        approximator_layers=layers["distilled_guidance_layer.layers"],
    )
