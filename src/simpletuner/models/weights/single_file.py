"""Single weight files: recognize the model and return one component's tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from simpletuner.errors import ModelError
from simpletuner.models.weights.model_format import FileKind, ModelFormat
from simpletuner.models.weights.scaled_fp8 import decode_fp8_tensors
from simpletuner.models.weights.weight_header import read_weight_header
from simpletuner.quantization.stored_tensor import StoredTensor

# Kinds of files that no component can be loaded from; families list them among their own.
LORA_FILE = FileKind(
    "a LoRA",
    "",
    (".lora_A.", ".lora_down.", ".lora.down.", ".hada_w1_a", ".lokr_w", "lora_unet_"),
)
STABLE_DIFFUSION_3_FILE = FileKind(
    "a Stable Diffusion 3 transformer", "", ("\njoint_blocks.0.", "\npos_embed.proj.")
)
STABLE_DIFFUSION_XL_FILE = FileKind(
    "Stable Diffusion XL",
    "",
    ("\nlabel_emb.0.0.", "conditioner.embedders.", "\nadd_embedding.linear_1."),
)
STABLE_DIFFUSION_1_FILE = FileKind(
    "Stable Diffusion 1 or 2", "", ("\ninput_blocks.0.0.", "\ndown_blocks.0.resnets.")
)
CLIP_FILE = FileKind("a CLIP text encoder", "", ("text_model.encoder.layers.0.",))


def identify_file(keys: Collection[str], model: ModelFormat) -> tuple[str, str]:
    """Return (kind of file, component it can be used as or ""), such as ("a LoRA", "")."""
    text = "\n".join(["", *keys, ""])
    for kind in model.file_kinds:
        if any(fragment in text for fragment in kind.key_fragments):
            return kind.title, kind.component
    examples = ", ".join(sorted(keys)[:3])
    return f"an unknown model (it holds {examples or 'no tensors'})", ""


def read_component(
    file: Path, component: str, model: ModelFormat
) -> tuple[dict[str, StoredTensor], Mapping[str, str]]:
    """Return one component's tensors without their key prefix, and the file's metadata.

    Raises ModelError when the file holds another model.
    """
    header = read_weight_header(file)
    prefix = _find_prefix(header.tensors, model.components[component].key_prefixes)
    tensors = {
        key[len(prefix) :]: stored
        for key, stored in header.tensors.items()
        if key.startswith(prefix)
    }
    kind, usable_as = identify_file(tensors, model)
    if usable_as != component:
        raise ModelError(f"{file} is {kind}; expected {model.components[component].title}.")
    renamed = model.components[component].rename_keys(tensors)
    return decode_fp8_tensors(renamed, file), header.metadata


def components_in_file(file: Path, model: ModelFormat) -> list[str]:
    """Return the components in a file: one, or all of an all-in-one checkpoint.

    Raises ModelError when it holds none.
    """
    keys = read_weight_header(file).tensors
    present = [
        component
        for component, described in model.components.items()
        if any(key.startswith(described.key_prefixes) for key in keys)
    ]
    if "transformer" in present:
        return present
    kind, usable_as = identify_file(keys, model)
    if not usable_as:
        raise ModelError(f"{file} is {kind}; expected {model.components['transformer'].title}.")
    return [usable_as]


def _find_prefix(keys: Collection[str], prefixes: tuple[str, ...]) -> str:
    return next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in keys)), "")
