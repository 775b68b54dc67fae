"""Chroma before any of it is loaded: its shape from config files at hand, or as it is published."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

import simpletuner.models as models_package
from simpletuner.config.paths import HUB_ID_PATTERN
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ModelError
from simpletuner.events.sinks import null_emit
from simpletuner.models.chroma import fingerprints, model_files
from simpletuner.models.chroma.transformer import TransformerConfig
from simpletuner.models.chroma.weights import (
    component_tensors,
    empty_transformer,
    read_transformer_config,
)
from simpletuner.models.family import ArchitectureConstants, ModelFiles, ModelSpec
from simpletuner.quantization import schemes

CHROMA_CONSTANTS = ArchitectureConstants(
    latent_channels=16,
    stride_px=8,
    alignment_px=64,
    token_px=16,
    max_tokens=fingerprints.MAX_TOKENS,
    text_width=4096,
    latent_shift=0.1159,
    latent_scale=0.3611,
)
# Parameters and bytes in the hub's files of Chroma 1: the transformer, T5 v1.1 XXL's encoder, Flux's VAE.
PUBLISHED_SIZES = {
    "transformer": (8_899_983_424, 17_800_000_000),
    "text_encoder": (4_762_310_656, 9_524_700_000),
    "vae": (83_819_683, 167_700_000),
}


def build_model_spec(
    options: ModelOptions,
    dtype: torch.dtype,
    read_facts: Callable[[ModelFiles], ArchitectureConstants],
) -> ModelSpec:
    """Nothing is asked of the network. A part whose weights are not at hand has its published size."""
    folders = {part: _local_component_path(part, options) for part in PUBLISHED_SIZES}
    at = folders["transformer"]
    config = TransformerConfig() if at is None else read_transformer_config(at)
    transformer = empty_transformer(config, options.base_model_precision, dtype)
    found = {part: _parameters_and_bytes(part, folder, options) for part, folder in folders.items()}
    sizes = {part: size or PUBLISHED_SIZES[part] for part, size in found.items()}
    wide_vae = options.vae_dtype == "fp32"
    name = (model_files.main_model_names(options) | model_files.separate_component_names(options))[
        "transformer"
    ]
    return ModelSpec(
        transformer,
        (*transformer.transformer_blocks, *transformer.single_transformer_blocks),
        config.width,
        _read_or_published_constants(folders, read_facts),
        at is None,
        fingerprints.text_encoder_dtype(options),
        int(sizes["text_encoder"][0] * _t5_bytes_per_parameter(options)),
        sizes["vae"][0] * (4 if wide_vae else 2),
        sum(parameter.nbytes for parameter in transformer.distilled_guidance_layer.parameters()),
        sum(PUBLISHED_SIZES[part][1] for part, size in found.items() if size is None),
        at is None and name not in model_files.FLAVOURS.values(),
    )


def _t5_bytes_per_parameter(options: ModelOptions) -> float:
    """Of a number of T5's; its embedding, 3 % of it, is taken for a linear."""
    if options.text_encoder_1_precision == "no_change":
        return fingerprints.text_encoder_dtype(options).itemsize
    return schemes.get_scheme(options.text_encoder_1_precision).size_bytes(1024, 1024) / 1024**2


def _local_component_path(part: str, options: ModelOptions) -> Path | None:
    """A part's folder or file, None when it is on the hub alone. ModelError for what is neither."""
    alone = model_files.separate_component_names(options).get(part)
    name, revision = (
        alone or model_files.main_model_names(options)[part],
        None if alone else options.revision,
    )
    path = Path(name).expanduser()
    if name == model_files.NANO and not path.is_dir():
        return Path(models_package.__path__[0]) / model_files.NANO / part
    if path.exists() or not HUB_ID_PATTERN.fullmatch(name):
        return model_files.component_path(
            part, model_files.resolve_root(name, [part], revision, "", null_emit)[0]
        )
    files = [f"{part}/config.json", *(["config.json"] if alone else [])]
    cached = [try_to_load_from_cache(name, file, revision=revision) for file in files]
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)


def _parameters_and_bytes(
    part: str, folder: Path | None, options: ModelOptions
) -> tuple[int, int] | None:
    """(parameters, bytes) of the weights on this disk, by their headers; None unless all are there."""
    if folder is None:
        return None
    try:
        found = component_tensors(folder, part, options.variant or "").values()
    except ModelError:  # not downloaded yet; if damaged, loading says so
        return None
    return sum(math.prod(one.shape) for one in found), sum(one.size_bytes for one in found)


def _read_or_published_constants(
    folders: Mapping[str, Path | None], read_facts: Callable[[ModelFiles], ArchitectureConstants]
) -> ArchitectureConstants:
    transformer, text, vae = (folders[part] for part in PUBLISHED_SIZES)
    if transformer is None or vae is None or text is None:
        return CHROMA_CONSTANTS
    return read_facts(ModelFiles("", "", transformer, vae, text, text))
