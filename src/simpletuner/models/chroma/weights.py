"""Weights between folders or single files and memory: checked first, then tensor by tensor."""

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
MAX_LISTED_PROBLEMS = 8  # problems spelled out before "and N more"


def read_json(path: Path) -> dict[str, object]:
    """A JSON object, or ModelError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return value


def read_transformer_config(place: Path) -> TransformerConfig:
    """Of a transformer's folder or single file."""
    if not place.is_file():
        return TransformerConfig.from_dict(
            read_json(place / "config.json"), str(place / "config.json")
        )
    shapes = {name: stored.shape for name, stored in single_file.read_transformer(place).items()}
    return native_names.infer_config(
        shapes, weight_header.read_weight_header(place).metadata, str(place)
    )


def read_t5_config(place: Path) -> dict[str, object]:
    return (
        single_file.infer_t5_config(place) if place.is_file() else read_json(place / "config.json")
    )


def read_vae_config(place: Path) -> dict[str, object]:
    return (
        single_file.infer_vae_config(place) if place.is_file() else read_json(place / "config.json")
    )


def weight_files(folder: Path, stem: str = WEIGHTS_STEM, variant: str = "") -> list[Path]:
    """The safetensors files of one part, sharded or single, all existing. variant: "fp16" in stem.fp16.*"""
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
            f"Weights are missing: {', '.join(missing)}. Download or copy the whole folder again."
        )
    return files


def read_stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a weight file. ModelError when it is cut short, damaged or something else."""
    return dict(weight_header.read_weight_header(path).tensors)


def component_tensors(
    place: Path,
    part: str,
    variant: str = "",
    file_of: Callable[[Path], dict[str, StoredTensor]] | None = None,
) -> dict[str, StoredTensor]:
    """Of a part's folder or file. file_of: reads a file, where its names are to be changed."""
    if place.is_file():
        return file_of(place) if file_of else single_file.read_component(place, part)[0]
    files = weight_files(place, WEIGHTS_STEMS[part], variant)
    return weight_header.decode_fp8_tensors(
        {name: one for file in files for name, one in read_stored_tensors(file).items()}, place
    )


def component_files(place: Path, part: str, variant: str = "") -> list[Path]:
    """Everything that says what a part is: its config and its weights, or the one file."""
    return (
        [place]
        if place.is_file()
        else [place / "config.json", *weight_files(place, WEIGHTS_STEMS[part], variant)]
    )


def check_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, StoredTensor | Tensor], where: Path
) -> None:
    """Every tensor there, none too many, all of the right shape; otherwise one ModelError with the list."""
    problems = [
        f"missing {name} {tuple(one.shape)}" for name, one in expected.items() if name not in found
    ]
    problems += [
        f"surplus {name} {tuple(one.shape)}" for name, one in found.items() if name not in expected
    ]
    for name, one in expected.items():
        if name not in found:
            continue
        if (shape := tuple(found[name].shape)) != tuple(one.shape):
            problems.append(f"{name} is {shape}, expected {tuple(one.shape)}")
        elif found[name].dtype.is_floating_point != one.dtype.is_floating_point:
            problems.append(f"{name} is {found[name].dtype}; only floating point and fp8 are read")
    if problems:
        more = (
            f"; and {len(problems) - MAX_LISTED_PROBLEMS} more"
            if len(problems) > MAX_LISTED_PROBLEMS
            else ""
        )
        told = "belong to its model" if where.is_file() else "its config.json describes"
        raise ModelError(
            f"{where} does not hold the weights that {told}: "
            + "; ".join(problems[:MAX_LISTED_PROBLEMS])
            + more
        )


def empty_transformer(
    config: TransformerConfig, precision: str = "no_change", dtype: torch.dtype = torch.bfloat16
) -> ChromaTransformer:
    """The network on the meta device in `dtype`, eval mode and frozen, without any weight.

    precision: a scheme of quantization.schemes for the linears in the blocks; norms, embedders, approximator
    and the final projection stay as they are.
    """
    with torch.device("meta"):
        transformer = ChromaTransformer(config)
    index_code = transformer.mod_proj  # real numbers, exact in float32 only
    transformer.to(dtype).mod_proj = index_code
    if precision != "no_change":
        quantize_modules(transformer, block_linears(transformer), precision)
    return transformer.requires_grad_(False).eval()


def block_linears(transformer: nn.Module) -> list[str]:
    """What is quantised: every linear inside a block."""
    modules = transformer.named_modules()
    return [
        name
        for name, one in modules
        if isinstance(one, nn.Linear) and name.startswith(BLOCK_PREFIXES)
    ]


def transformer_tensors(place: Path, variant: str = "") -> dict[str, StoredTensor]:
    """The tensors of a `transformer` folder or single file, all of them there and of the right shape."""
    found = component_tensors(place, "transformer", variant, single_file.read_transformer)
    check_tensors(empty_transformer(read_transformer_config(place)).state_dict(), found, place)
    return found


def load_transformer(
    place: Path, device: torch.device, dtype: torch.dtype, variant: str = ""
) -> ChromaTransformer:
    """Read a diffusers `transformer` folder or a single file; eval mode, every parameter frozen.

    Nothing is read before all headers fit. Peak memory is the model plus its largest tensor: each is cast
    and moved on its own.
    """
    found = transformer_tensors(place, variant)
    transformer = empty_transformer(read_transformer_config(place), dtype=dtype)
    load_stored_tensors(transformer, found, device)
    transformer.mod_proj = transformer.mod_proj.to(device)
    return transformer


def load_stored_tensors(
    network: nn.Module, found: Mapping[str, StoredTensor], device: torch.device
) -> None:
    """Copy tensors one by one into a network on the meta device, in the dtypes that it was built with.

    Never views: they would change under us when somebody rewrites a file.
    """
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    state = {name: stored.load().to(device, dtypes[name]) for name, stored in found.items()}
    network.load_state_dict(state, strict=False, assign=True)


def load_quantized_transformer(
    file: Path, config: TransformerConfig, precision: str, device: torch.device, dtype: torch.dtype
) -> ChromaTransformer:
    """What `convert` made of a transformer. On the CPU its parts are views of the file: read when used."""
    transformer = empty_transformer(config, precision, dtype)
    check_tensors(transformer.state_dict(), read_stored_tensors(file), file)
    load_from_file(transformer, file, device)
    transformer.mod_proj = transformer.mod_proj.to(device)
    return transformer


def load_from_file(network: nn.Module, file: Path, device: torch.device) -> None:
    """Put a file's tensors into a network on the meta device, in the dtypes that it was built with.

    Views of the file where neither device nor dtype change: for files that only ever are replaced as a whole.
    """
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    with safe_open(file, framework="pt", device="cpu") as tensors:
        state = {
            name: tensors.get_tensor(name).to(device, dtypes[name])
            for name in tensors.keys()  # noqa: SIM118
        }
    network.load_state_dict(state, strict=False, assign=True)


def save_transformer(transformer: nn.Module, folder: Path) -> None:
    """Write config.json and safetensors (shards of at most 10 GB) that diffusers reads as well."""
    if not isinstance(transformer, ChromaTransformer):
        raise TypeError(f"not Chroma's transformer: {type(transformer).__name__}")
    expected = set(_expected_names(transformer.config))
    state = {name: tensor for name, tensor in transformer.state_dict().items() if name in expected}
    if len(state) != len(expected):
        raise ModelError(
            "A transformer with adapters inside is not saved at full rank; save the adapter instead."
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
