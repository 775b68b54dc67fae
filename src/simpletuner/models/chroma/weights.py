"""Chroma's transformer between weight files and memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from simpletuner.errors import ModelError
from simpletuner.models.chroma import native_names, single_file
from simpletuner.models.chroma.model_format import CHROMA_FORMAT, WEIGHTS_STEM
from simpletuner.models.chroma.transformer import ChromaTransformer
from simpletuner.models.chroma.transformer_config import CLASS_NAME, TransformerConfig
from simpletuner.models.family import WholeTensorOf, as_it_is
from simpletuner.models.weights.components import component_tensors
from simpletuner.models.weights.model_folder import read_json
from simpletuner.models.weights.tensor_files import (
    send_tensors,
    split_into_files,
    write_tensors,
)
from simpletuner.models.weights.tensor_loading import (
    check_tensors,
    load_from_file,
    load_stored_tensors,
    read_stored_tensors,
)
from simpletuner.models.weights.weight_header import read_weight_header
from simpletuner.quantization.quantized_linear import quantize_modules
from simpletuner.quantization.stored_tensor import StoredTensor

SHARD_BYTES = 10 * 10**9
BLOCK_PREFIXES = ("transformer_blocks.", "single_transformer_blocks.")


def read_transformer_config(path: Path) -> TransformerConfig:
    """Read the config of a transformer's folder, or infer it from a single file."""
    if not path.is_file():
        return TransformerConfig.from_dict(
            read_json(path / "config.json"), str(path / "config.json")
        )
    shapes = {name: stored.shape for name, stored in single_file.read_transformer(path).items()}
    return native_names.infer_config(shapes, read_weight_header(path).metadata, str(path))


def read_t5_config(path: Path) -> dict[str, object]:
    """Read the config of a T5 encoder's folder, or infer it from a single file."""
    return single_file.infer_t5_config(path) if path.is_file() else read_json(path / "config.json")


def read_vae_config(path: Path) -> dict[str, object]:
    """Read the config of a VAE's folder, or infer it from a single file."""
    return single_file.infer_vae_config(path) if path.is_file() else read_json(path / "config.json")


def empty_transformer(
    config: TransformerConfig, precision: str = "no_change", dtype: torch.dtype = torch.bfloat16
) -> ChromaTransformer:
    """Build the network on the meta device in `dtype`, in eval mode and frozen.

    precision: a scheme of quantization.schemes for the linears in the blocks; norms, embedders,
    approximator and final projection are never quantized.
    """
    with torch.device("meta"):
        transformer = ChromaTransformer(config)
    index_embedding = transformer.mod_proj  # not on the meta device; exact only in float32
    transformer.to(dtype).mod_proj = index_embedding
    if precision != "no_change":
        quantize_modules(transformer, block_linears(transformer), precision)
    return transformer.requires_grad_(False).eval()


def block_linears(transformer: nn.Module) -> list[str]:
    """Return the names of the linears in the blocks, which quantization applies to."""
    modules = transformer.named_modules()
    return [
        name
        for name, module in modules
        if isinstance(module, nn.Linear) and name.startswith(BLOCK_PREFIXES)
    ]


def transformer_tensors(path: Path, variant: str = "") -> dict[str, StoredTensor]:
    """Return the tensors of a `transformer` folder or single file, checked to be complete."""
    tensors = component_tensors(
        path, "transformer", CHROMA_FORMAT, variant, single_file.read_transformer
    )
    check_tensors(empty_transformer(read_transformer_config(path)).state_dict(), tensors, path)
    return tensors


def load_transformer(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    variant: str = "",
    as_views: bool = False,
) -> ChromaTransformer:
    """Load a `transformer` folder or single file, in eval mode and frozen.

    Nothing is loaded before all headers are checked. Peak memory is the model plus its largest
    tensor, because each tensor is cast and moved separately. as_views: see load_stored_tensors.
    """
    tensors = transformer_tensors(path, variant)
    transformer = empty_transformer(read_transformer_config(path), dtype=dtype)
    load_stored_tensors(transformer, tensors, device, as_views)
    transformer.mod_proj = transformer.mod_proj.to(device)
    return transformer


def load_quantized_transformer(
    file: Path, config: TransformerConfig, precision: str, device: torch.device, dtype: torch.dtype
) -> ChromaTransformer:
    """Load a converted transformer. On the CPU its buffers are views of the file, read on use."""
    transformer = empty_transformer(config, precision, dtype)
    check_tensors(transformer.state_dict(), read_stored_tensors(file), file)
    load_from_file(transformer, file, device)
    transformer.mod_proj = transformer.mod_proj.to(device)
    return transformer


def save_transformer(
    transformer: nn.Module, folder: Path | None, whole: WholeTensorOf = as_it_is
) -> None:
    """Write config.json and safetensors shards of at most 10 GB, which diffusers reads as well.

    One tensor after the other is made whole and written. folder: None takes part in that only.
    """
    if not isinstance(transformer, ChromaTransformer):
        raise TypeError(f"not Chroma's transformer: {type(transformer).__name__}")
    expected = set(_expected_names(transformer.config))
    held = transformer.state_dict(keep_vars=True)
    state = {name: tensor for name, tensor in held.items() if name in expected}
    if len(state) != len(expected):
        raise ModelError(
            "A transformer with an adapter cannot be saved as a full model; save the adapter"
            " instead."
        )
    tensors = {name: whole(tensor) for name, tensor in state.items()}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    files = split_into_files(WEIGHTS_STEM, sizes, SHARD_BYTES)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(
            folder / "config.json", {"_class_name": CLASS_NAME, **transformer.config.__dict__}
        )
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {name: file for file, names in files.items() for name in names},
            }
            _write_json(folder / f"{WEIGHTS_STEM}.safetensors.index.json", index)
    for file, names in files.items():
        parts = {name: tensors[name] for name in names}
        if folder is None:
            send_tensors(parts)
        else:
            write_tensors(folder / file, parts, {"format": "pt"})


def _write_json(path: Path, fields: Mapping[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _expected_names(config: TransformerConfig) -> list[str]:
    return list(empty_transformer(config).state_dict())
