"""Chroma before any of it is loaded: its shape from config files at hand, or as it is published."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

import simpletuner.models as models_package
from simpletuner.config.paths import HUB_ID
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ModelError
from simpletuner.events.sinks import silent
from simpletuner.models.chroma import fingerprints, sources
from simpletuner.models.chroma.transformer import TransformerConfig
from simpletuner.models.chroma.weights import empty_transformer, part_tensors, read_config
from simpletuner.models.family import Facts, Sketch, Source
from simpletuner.quantization import schemes

FACTS = Facts(
    latent_channels=16, stride_px=8, alignment_px=64, token_px=16, max_tokens=fingerprints.MAX_TOKENS,
    text_width=4096, latent_shift=0.1159, latent_scale=0.3611,
)  # fmt: skip
# Parameters and bytes in the hub's files of Chroma 1: the transformer, T5 v1.1 XXL's encoder, Flux's VAE.
PUBLISHED = {
    "transformer": (8_899_983_424, 17_800_000_000),
    "text_encoder": (4_762_310_656, 9_524_700_000),
    "vae": (83_819_683, 167_700_000),
}


def sketch(options: ModelOptions, dtype: torch.dtype, read_facts: Callable[[Source], Facts]) -> Sketch:
    """Nothing is asked of the network. A part whose weights are not at hand has its published size."""
    folders = {part: _folder(part, options) for part in PUBLISHED}
    at = folders["transformer"]
    config = TransformerConfig() if at is None else read_config(at)
    transformer = empty_transformer(config, options.base_model_precision, dtype)
    found = {part: _size(part, folder, options) for part, folder in folders.items()}
    sizes = {part: size or PUBLISHED[part] for part, size in found.items()}
    wide_vae = options.vae_dtype == "fp32"
    name = (sources.mains(options) | sources.separate(options))["transformer"]
    return Sketch(
        transformer,
        (*transformer.transformer_blocks, *transformer.single_transformer_blocks),
        config.width,
        _facts(folders, read_facts),
        at is None,
        fingerprints.text_dtype(options),
        int(sizes["text_encoder"][0] * _bytes_each(options)),
        sizes["vae"][0] * (4 if wide_vae else 2),
        sum(parameter.nbytes for parameter in transformer.distilled_guidance_layer.parameters()),
        sum(PUBLISHED[part][1] for part, size in found.items() if size is None),
        at is None and name not in sources.FLAVOURS.values(),
    )


def _bytes_each(options: ModelOptions) -> float:
    """Of a number of T5's; its embedding, 3 % of it, is taken for a linear."""
    if options.text_encoder_1_precision == "no_change":
        return fingerprints.text_dtype(options).itemsize
    return schemes.named(options.text_encoder_1_precision).size_bytes(1024, 1024) / 1024**2


def _folder(part: str, options: ModelOptions) -> Path | None:
    """A part's folder or file, None when it is on the hub alone. ModelError for what is neither."""
    alone = sources.separate(options).get(part)
    name, revision = alone or sources.mains(options)[part], None if alone else options.revision
    path = Path(name).expanduser()
    if name == sources.NANO and not path.is_dir():
        return Path(models_package.__path__[0]) / sources.NANO / part
    if path.exists() or not HUB_ID.fullmatch(name):
        return sources.place_of(part, sources.root_of(name, [part], revision, "", silent)[0])
    files = [f"{part}/config.json", *(["config.json"] if alone else [])]
    cached = [try_to_load_from_cache(name, file, revision=revision) for file in files]
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)


def _size(part: str, folder: Path | None, options: ModelOptions) -> tuple[int, int] | None:
    """(parameters, bytes) of the weights on this disk, by their headers; None unless all are there."""
    if folder is None:
        return None
    try:
        found = part_tensors(folder, part, options.variant or "").values()
    except ModelError:  # not downloaded yet; if damaged, loading says so
        return None
    return sum(math.prod(one.shape) for one in found), sum(one.size_bytes for one in found)


def _facts(folders: Mapping[str, Path | None], read_facts: Callable[[Source], Facts]) -> Facts:
    transformer, text, vae = (folders[part] for part in PUBLISHED)
    if transformer is None or vae is None or text is None:
        return FACTS
    return read_facts(Source("", "", transformer, vae, text, text))
