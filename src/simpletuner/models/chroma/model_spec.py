"""Chroma before its weights are loaded: its shape from local config files, or as published."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import simpletuner.models as models_package
from simpletuner.config.model_families import BUCKET_ALIGNMENT_PX
from simpletuner.config.paths import HUB_ID_PATTERN
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ModelError
from simpletuner.events.sinks import null_emit
from simpletuner.models.chroma import fingerprints, model_files
from simpletuner.models.chroma.model_format import CHROMA_FORMAT
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.models.chroma.weights import empty_transformer, read_transformer_config
from simpletuner.models.family import ArchitectureConstants, ModelFiles, ModelSpec, TextTensor
from simpletuner.models.weights.components import component_tensors
from simpletuner.models.weights.locations import component_path
from simpletuner.quantization import schemes

CHROMA_CONSTANTS = ArchitectureConstants(
    latent_channels=16,
    stride_px=8,
    alignment_px=BUCKET_ALIGNMENT_PX["chroma"],
    token_px=16,
    max_tokens=fingerprints.MAX_TOKENS,
    text_tensors={fingerprints.T5_TENSOR: TextTensor(4096)},
    latent_shift=0.1159,
    latent_scale=0.3611,
)
# (parameters, bytes of the hub's files) of Chroma 1, T5 v1.1 XXL's encoder and Flux's VAE.
PUBLISHED_SIZES = {
    "transformer": (8_899_983_424, 17_800_000_000),
    "text_encoder": (4_762_310_656, 9_524_700_000),
    "vae": (83_819_683, 167_700_000),
}


def build_model_spec(
    options: ModelOptions,
    dtype: torch.dtype,
    read_constants: Callable[[ModelFiles], ArchitectureConstants],
) -> ModelSpec:
    """Describe the model without network access, using published sizes for absent weights."""
    folders = {component: local_component_path(component, options) for component in PUBLISHED_SIZES}
    transformer_path = folders["transformer"]
    config = (
        TransformerConfig()
        if transformer_path is None
        else read_transformer_config(transformer_path)
    )
    transformer = empty_transformer(config, options.base_model_precision, dtype)
    local_sizes = {
        component: _parameters_and_bytes(component, folder, options)
        for component, folder in folders.items()
    }
    sizes = {
        component: size or PUBLISHED_SIZES[component] for component, size in local_sizes.items()
    }
    vae_is_float32 = options.vae_dtype == "fp32"
    name = (model_files.main_model_names(options) | model_files.separate_component_names(options))[
        "transformer"
    ]
    return ModelSpec(
        transformer,
        (*transformer.transformer_blocks, *transformer.single_transformer_blocks),
        config.width,
        config.num_attention_heads,
        _read_or_published_constants(folders, read_constants),
        transformer_path is None,
        fingerprints.text_encoder_dtype(options),
        int(sizes["text_encoder"][0] * _t5_bytes_per_parameter(options)),
        sizes["vae"][0] * (4 if vae_is_float32 else 2),
        sum(parameter.nbytes for parameter in transformer.distilled_guidance_layer.parameters()),
        sum(
            PUBLISHED_SIZES[component][1] for component, size in local_sizes.items() if size is None
        ),
        transformer_path is None and name not in model_files.FLAVOURS.values(),
    )


def _t5_bytes_per_parameter(options: ModelOptions) -> float:
    """Return the bytes per T5 parameter, counting the embedding (3 %) as a linear."""
    if options.text_encoder_1_precision == "no_change":
        return fingerprints.text_encoder_dtype(options).itemsize
    return schemes.get_scheme(options.text_encoder_1_precision).size_bytes(1024, 1024) / 1024**2


def local_component_path(component: str, options: ModelOptions) -> Path | None:
    """Return a component's local path, or None when it is only on the hub.

    Raises ModelError for a name that is neither local nor a hub id.
    """
    separate_name = model_files.separate_component_names(options).get(component)
    name = separate_name or model_files.main_model_names(options)[component]
    revision = None if separate_name else options.revision
    path = Path(os.path.expanduser(name))
    if name == model_files.NANO and not path.is_dir():
        return Path(models_package.__path__[0]) / model_files.NANO / component
    if path.exists() or not HUB_ID_PATTERN.fullmatch(name):
        root, _ = model_files.locate_root(name, [component], revision, "", null_emit)
        return component_path(component, root, CHROMA_FORMAT)
    from huggingface_hub import try_to_load_from_cache  # slow, and no local model needs it

    files = [f"{component}/config.json", *(["config.json"] if separate_name else [])]
    cached = [try_to_load_from_cache(name, file, revision=revision) for file in files]
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)


def _parameters_and_bytes(
    component: str, folder: Path | None, options: ModelOptions
) -> tuple[int, int] | None:
    """Return (parameters, bytes) from the headers of local weights; None if any is missing."""
    if folder is None:
        return None
    try:
        tensors = component_tensors(
            folder, component, CHROMA_FORMAT, options.variant or ""
        ).values()
    except ModelError:  # not downloaded yet; damaged files are reported when they are loaded
        return None
    return sum(math.prod(tensor.shape) for tensor in tensors), sum(
        tensor.size_bytes for tensor in tensors
    )


def _read_or_published_constants(
    folders: Mapping[str, Path | None],
    read_constants: Callable[[ModelFiles], ArchitectureConstants],
) -> ArchitectureConstants:
    transformer, text, vae = (folders[part] for part in PUBLISHED_SIZES)
    if transformer is None or vae is None or text is None:
        return CHROMA_CONSTANTS
    return read_constants(ModelFiles("", "", transformer, vae, text, text))
