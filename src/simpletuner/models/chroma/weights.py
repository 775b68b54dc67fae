"""Weights in folders or single files: checked first, then loaded tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from simpletuner.errors import ModelError
from simpletuner.models.chroma import native_names, single_file, weight_header
from simpletuner.models.chroma.transformer import CLASS_NAME, ChromaTransformer, TransformerConfig
from simpletuner.quantization.convert import StoredTensor
from simpletuner.quantization.quantized_linear import quantize_modules

WEIGHTS_STEM = "diffusion_pytorch_model"
WEIGHTS_STEMS = {"transformer": WEIGHTS_STEM, "vae": WEIGHTS_STEM, "text_encoder": "model"}
BLOCK_PREFIXES = ("transformer_blocks.", "single_transformer_blocks.")
MAX_LISTED_PROBLEMS = 8  # the others are only counted


def read_json(path: Path) -> dict[str, object]:
    """Return a JSON object. Raises ModelError with the file's path."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return value


def read_transformer_config(path: Path) -> TransformerConfig:
    """Read the config of a transformer's folder, or infer it from a single file."""
    if not path.is_file():
        return TransformerConfig.from_dict(
            read_json(path / "config.json"), str(path / "config.json")
        )
    shapes = {name: stored.shape for name, stored in single_file.read_transformer(path).items()}
    return native_names.infer_config(
        shapes, weight_header.read_weight_header(path).metadata, str(path)
    )


def read_t5_config(path: Path) -> dict[str, object]:
    """Read the config of a T5 encoder's folder, or infer it from a single file."""
    return single_file.infer_t5_config(path) if path.is_file() else read_json(path / "config.json")


def read_vae_config(path: Path) -> dict[str, object]:
    """Read the config of a VAE's folder, or infer it from a single file."""
    return single_file.infer_vae_config(path) if path.is_file() else read_json(path / "config.json")


def weight_files(folder: Path, stem: str = WEIGHTS_STEM, variant: str = "") -> list[Path]:
    """Return the existing safetensors files of one component, sharded or single.

    variant: "fp16" in stem.fp16.safetensors.
    """
    name = f"{stem}.{variant}" if variant else stem
    index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map.")
        files = [
            folder / Path(str(file)).name for file in sorted(set(map(str, weight_map.values())))
        ]
    else:
        files = [folder / f"{name}.safetensors"]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"Weight files are missing: {', '.join(missing)}. Download or copy the whole folder again."
        )
    return files


def read_stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a weight file. Raises ModelError for a damaged or other file."""
    return dict(weight_header.read_weight_header(path).tensors)


def component_tensors(
    path: Path,
    component: str,
    variant: str = "",
    read_file: Callable[[Path], dict[str, StoredTensor]] | None = None,
) -> dict[str, StoredTensor]:
    """Return the tensors of a component's folder or single file.

    read_file: reads a single file, for components whose keys are renamed.
    """
    if path.is_file():
        return read_file(path) if read_file else single_file.read_component(path, component)[0]
    files = weight_files(path, WEIGHTS_STEMS[component], variant)
    return weight_header.decode_fp8_tensors(
        {name: tensor for file in files for name, tensor in read_stored_tensors(file).items()}, path
    )


def component_files(path: Path, component: str, variant: str = "") -> list[Path]:
    """Return the files that define a component: its config and weights, or the single file."""
    return (
        [path]
        if path.is_file()
        else [path / "config.json", *weight_files(path, WEIGHTS_STEMS[component], variant)]
    )


def check_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, StoredTensor | Tensor], where: Path
) -> None:
    """Check names, shapes and kinds of dtype; one ModelError lists all problems."""
    problems = [
        f"{name} {tuple(tensor.shape)} is missing"
        for name, tensor in expected.items()
        if name not in found
    ]
    problems += [
        f"{name} {tuple(tensor.shape)} is unexpected"
        for name, tensor in found.items()
        if name not in expected
    ]
    for name, tensor in expected.items():
        if name not in found:
            continue
        if (shape := tuple(found[name].shape)) != tuple(tensor.shape):
            problems.append(f"{name} is {shape}, expected {tuple(tensor.shape)}")
        elif found[name].dtype.is_floating_point != tensor.dtype.is_floating_point:
            problems.append(f"{name} is {found[name].dtype}; only floating point is supported")
    if problems:
        remainder = (
            f"; and {len(problems) - MAX_LISTED_PROBLEMS} more"
            if len(problems) > MAX_LISTED_PROBLEMS
            else ""
        )
        expectation = "of its model" if where.is_file() else "that its config.json describes"
        raise ModelError(
            f"{where} does not hold the weights {expectation}: "
            + "; ".join(problems[:MAX_LISTED_PROBLEMS])
            + remainder
        )


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
    tensors = component_tensors(path, "transformer", variant, single_file.read_transformer)
    check_tensors(empty_transformer(read_transformer_config(path)).state_dict(), tensors, path)
    return tensors


def load_transformer(
    path: Path, device: torch.device, dtype: torch.dtype, variant: str = ""
) -> ChromaTransformer:
    """Load a `transformer` folder or single file, in eval mode and frozen.

    Nothing is loaded before all headers are checked. Peak memory is the model plus its largest
    tensor, because each tensor is cast and moved separately.
    """
    tensors = transformer_tensors(path, variant)
    transformer = empty_transformer(read_transformer_config(path), dtype=dtype)
    load_stored_tensors(transformer, tensors, device)
    transformer.mod_proj = transformer.mod_proj.to(device)
    return transformer


def load_stored_tensors(
    network: nn.Module, tensors: Mapping[str, StoredTensor], device: torch.device
) -> None:
    """Copy tensors one by one into a network on the meta device, in the network's dtypes.

    They are never views of the file, which would change when another program rewrites it.
    """
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    state = {name: stored.load().to(device, dtypes[name]) for name, stored in tensors.items()}
    network.load_state_dict(state, strict=False, assign=True)


def load_quantized_transformer(
    file: Path, config: TransformerConfig, precision: str, device: torch.device, dtype: torch.dtype
) -> ChromaTransformer:
    """Load a converted transformer. On the CPU its buffers are views of the file, read on use."""
    transformer = empty_transformer(config, precision, dtype)
    check_tensors(transformer.state_dict(), read_stored_tensors(file), file)
    load_from_file(transformer, file, device)
    transformer.mod_proj = transformer.mod_proj.to(device)
    return transformer


def load_from_file(network: nn.Module, file: Path, device: torch.device) -> None:
    """Load a file's tensors into a network on the meta device, in the network's dtypes.

    Tensors are views of the file where neither device nor dtype change, so the file may only ever
    be replaced as a whole, never modified.
    """
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    with safe_open(file, framework="pt", device="cpu") as tensors:
        state = {
            name: tensors.get_tensor(name).to(device, dtypes[name])
            for name in tensors.keys()  # noqa: SIM118
        }
    network.load_state_dict(state, strict=False, assign=True)


def save_transformer(transformer: nn.Module, folder: Path) -> None:
    """Write config.json and safetensors shards of at most 10 GB, which diffusers reads as well."""
    if not isinstance(transformer, ChromaTransformer):
        raise TypeError(f"not Chroma's transformer: {type(transformer).__name__}")
    expected = set(_expected_names(transformer.config))
    state = {name: tensor for name, tensor in transformer.state_dict().items() if name in expected}
    if len(state) != len(expected):
        raise ModelError(
            "A transformer with an adapter cannot be saved as a full model; save the adapter instead."
        )
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"_class_name": CLASS_NAME, **transformer.config.__dict__}
    (folder / "config.json").write_text(
        json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    save_torch_state_dict(
        state,
        folder,
        filename_pattern=f"{WEIGHTS_STEM}{{suffix}}.safetensors",
        max_shard_size="10GB",
        safe_serialization=True,
    )


def _expected_names(config: TransformerConfig) -> list[str]:
    return list(empty_transformer(config).state_dict())
