"""Weights between a diffusers `transformer` folder and memory: checked first, then tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import nn

from simpletuner.errors import ModelError
from simpletuner.models.chroma.transformer import CLASS_NAME, ChromaTransformer, TransformerConfig
from simpletuner.quantization.convert import DTYPES, Stored
from simpletuner.quantization.linear import quantize_modules

STEM = "diffusion_pytorch_model"
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
SHOWN = 8  # problems spelled out before "and N more"


def read_json(path: Path) -> dict[str, object]:
    """A JSON object, or ModelError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return value


def read_config(folder: Path) -> TransformerConfig:
    return TransformerConfig.read(read_json(folder / "config.json"), str(folder / "config.json"))


def weight_files(folder: Path, stem: str = STEM, variant: str = "") -> list[Path]:
    """The safetensors files of one part, sharded or single, all existing. variant: "fp16" in stem.fp16.*"""
    name = f"{stem}.{variant}" if variant else stem
    index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map.")
        files = [folder / str(file) for file in sorted(set(weight_map.values()))]
    else:
        files = [folder / f"{name}.safetensors"]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"Weights are missing: {', '.join(missing)}. Download or copy the whole folder again."
        )
    return files


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file. ModelError when it is cut short or no safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ModelError(
                f"{path} is cut short or not a safetensors file ({size:,} bytes). Download it again."
            )
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            found = {
                name: Stored(
                    path, tuple(entry["shape"]), DTYPES[entry["dtype"]], 8 + length + entry["data_offsets"][0]
                )
                for name, entry in entries.items()
            }
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{path} has a damaged header. Download it again.") from None
    if size != 8 + length + end:
        raise ModelError(
            f"{path} has {size:,} bytes where its header promises {8 + length + end:,}: it is cut short or"
            " damaged. Download it again."
        )
    return found


def check(expected: Mapping[str, torch.Size], found: Mapping[str, Stored], where: Path) -> None:
    """Every tensor there, none too many, all of the right shape; otherwise one ModelError with the list."""
    problems = [f"missing {name} {tuple(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"surplus {name} {entry.shape}" for name, entry in found.items() if name not in expected]
    problems += [
        f"{name} is {found[name].shape}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ModelError(
            f"{where} does not hold the weights that its config.json describes: "
            + "; ".join(problems[:SHOWN])
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
    return [name for name, one in modules if isinstance(one, nn.Linear) and name.startswith(BLOCKS)]


def stored_transformer(folder: Path, variant: str = "") -> dict[str, Stored]:
    """The tensors of a diffusers `transformer` folder, all of them there and of the right shape."""
    expected = empty_transformer(read_config(folder)).state_dict()
    files = weight_files(folder, variant=variant)
    found = {name: entry for file in files for name, entry in read_header(file).items()}
    check({name: tensor.shape for name, tensor in expected.items()}, found, folder)
    return found


def load_transformer(
    folder: Path, device: torch.device, dtype: torch.dtype, variant: str = ""
) -> ChromaTransformer:
    """Read a diffusers `transformer` folder; eval mode, every parameter frozen.

    Nothing is read before all headers fit. Peak memory is the model plus its largest tensor: each is cast
    and moved on its own.
    """
    found = stored_transformer(folder, variant)
    transformer = empty_transformer(read_config(folder), dtype=dtype)
    for file in sorted({stored.file for stored in found.values()}):
        # copied: a view of the file would change under us when somebody rewrites it.
        fill(transformer, file, device, copy=True)
    transformer.mod_proj = transformer.mod_proj.to(device)
    return transformer


def load_quantized(
    file: Path, config: TransformerConfig, precision: str, device: torch.device, dtype: torch.dtype
) -> ChromaTransformer:
    """What `convert` made of a transformer. On the CPU its parts are views of the file: read when used."""
    transformer = empty_transformer(config, precision, dtype)
    shapes = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    check(shapes, read_header(file), file)
    fill(transformer, file, device)
    transformer.mod_proj = transformer.mod_proj.to(device)
    return transformer


def fill(network: nn.Module, file: Path, device: torch.device, copy: bool = False) -> None:
    """Put a file's tensors into a network on the meta device, in the dtypes that it was built with.

    copy: False keeps views of the file where neither device nor dtype change: for files that only ever are
    replaced as a whole.
    """
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    with safe_open(file, framework="pt", device="cpu") as tensors:
        state = {
            name: tensors.get_tensor(name).to(device, dtypes[name], copy=copy)
            for name in tensors.keys()  # noqa: SIM118
        }
    network.load_state_dict(state, strict=False, assign=True)


def save_transformer(transformer: nn.Module, folder: Path) -> None:
    """Write config.json and safetensors (shards of at most 10 GB) that diffusers reads as well."""
    if not isinstance(transformer, ChromaTransformer):
        raise TypeError(f"not Chroma's transformer: {type(transformer).__name__}")
    expected = set(_meta_names(transformer.config))
    state = {name: tensor for name, tensor in transformer.state_dict().items() if name in expected}
    if len(state) != len(expected):
        raise ModelError(
            "A transformer with adapters inside is not saved at full rank; save the adapter instead."
        )
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"_class_name": CLASS_NAME, **transformer.config.__dict__}
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_torch_state_dict(
        state,
        folder,
        filename_pattern=f"{STEM}{{suffix}}.safetensors",
        max_shard_size="10GB",
        safe_serialization=True,
    )


def _meta_names(config: TransformerConfig) -> list[str]:
    return list(empty_transformer(config).state_dict())
