"""The twelve layouts of LoRA files, written out by hand: what people hold, and what it is meant to
do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# native matrix -> diffusers modules by rows, and how often the width goes into rows of each and
# columns
NATIVE_MODULES = {
    "double_blocks.0.img_attn.qkv": (
        (
            "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k",
            "transformer_blocks.0.attn.to_v",
        ),
        (1, 1, 1), 1,
    ),
    "double_blocks.0.txt_attn.qkv": (
        (
            "transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.attn.add_k_proj",
            "transformer_blocks.0.attn.add_v_proj",
        ),
        (1, 1, 1), 1,
    ),
    "double_blocks.0.img_attn.proj": (("transformer_blocks.0.attn.to_out.0",), (1,), 1),
    "double_blocks.0.txt_attn.proj": (("transformer_blocks.0.attn.to_add_out",), (1,), 1),
    "double_blocks.0.img_mlp.0": (("transformer_blocks.0.ff.net.0.proj",), (4,), 1),
    "double_blocks.0.img_mlp.2": (("transformer_blocks.0.ff.net.2",), (1,), 4),
    "double_blocks.0.txt_mlp.0": (("transformer_blocks.0.ff_context.net.0.proj",), (4,), 1),
    "double_blocks.0.txt_mlp.2": (("transformer_blocks.0.ff_context.net.2",), (1,), 4),
    "single_blocks.0.linear1": (
        (
            "single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k",
            "single_transformer_blocks.0.attn.to_v", "single_transformer_blocks.0.proj_mlp",
        ),
        (1, 1, 1, 4), 1,
    ),
    "single_blocks.0.linear2": (("single_transformer_blocks.0.proj_out",), (1,), 5),
}  # fmt: skip
ATTENTION_SUFFIXES = ("qkv", "proj", "linear1", "linear2")


@dataclass
class LayoutFile:
    """A file's content and the deltas it stands for: module -> (A, B, strength)."""

    tensors: Tensors
    header: dict[str, str] = field(default_factory=dict)
    expected_deltas: dict[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)


def split_factors(width: int, rank: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Every linear of one block of each kind, as diffusers splits them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        part: (draw(rank, columns * width), draw(rows * width, rank))
        for parts, counts, columns in NATIVE_MODULES.values()
        for part, rows in zip(parts, counts)
    }


def fused_factors(width: int, rank: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        native: (
            torch.randn(rank, columns * width, generator=generator),
            torch.randn(sum(counts) * width, rank, generator=generator),
        )
        for native, (_, counts, columns) in NATIVE_MODULES.items()
    }


def underscored(name: str) -> str:
    return name.replace(".", "_")


def make_diffusers_file(key, ends, alpha, width, rank, header=False, seed=0) -> LayoutFile:
    """key: module -> all of the key before the factor. alpha: None where the file has none."""
    held = LayoutFile({})
    for name, (a, b) in split_factors(width, rank, seed).items():
        held.tensors[f"{key(name)}.{ends[0]}.weight"] = a
        held.tensors[f"{key(name)}.{ends[1]}.weight"] = b
        if alpha is not None:
            held.tensors[f"{key(name)}.alpha"] = torch.tensor(float(alpha))
        held.expected_deltas[name] = (
            a,
            b,
            1.0 if alpha is None and not header else (alpha or header) / rank,
        )
    if header:
        config = {"r": rank, "lora_alpha": header, "target_modules": list(held.expected_deltas)}
        fields = {f"transformer.{name}": value for name, value in config.items()}
        held.header["lora_adapter_metadata"] = json.dumps(fields)
    return held


def make_native_file(key, ends, alpha, width, rank, seed=0) -> LayoutFile:
    held = LayoutFile({})
    for native, (a, b) in fused_factors(width, rank, seed).items():
        held.tensors[f"{key(native)}.{ends[0]}.weight"] = a
        held.tensors[f"{key(native)}.{ends[1]}.weight"] = b
        if alpha is not None:
            held.tensors[f"{key(native)}.alpha"] = torch.tensor(float(alpha))
        parts, counts, _ = NATIVE_MODULES[native]
        start = 0
        for part, rows in zip(parts, counts):
            held.expected_deltas[part] = (
                a,
                b[start : start + rows * width],
                1.0 if alpha is None else alpha / rank,
            )
            start += rows * width
    return held


def numbered(name: str) -> str:
    """OneTrainer's original names: the native matrix, and the number of the part in it."""
    for native, (parts, _, _) in NATIVE_MODULES.items():
        if name in parts:
            return f"transformer.{native}" + f".{parts.index(name)}" * (len(parts) > 1)
    raise KeyError(name)


AB, DOWN_UP = ("lora_A", "lora_B"), ("lora_down", "lora_up")


def make_all_layouts(width: int, rank: int = 4, alpha: float = 2.0) -> Mapping[str, LayoutFile]:
    """Row of the matrix -> file."""

    def transformer(name: str) -> str:
        return f"transformer.{name}"

    return {
        "diffusers": make_diffusers_file(transformer, AB, None, width, rank),
        "diffusers+alpha": make_diffusers_file(transformer, AB, alpha, width, rank),
        "diffusers+header": make_diffusers_file(transformer, AB, None, width, rank, header=alpha),
        "diffusers+both": make_diffusers_file(transformer, AB, alpha, width, rank, header=alpha),
        "transformer-kohya": make_diffusers_file(transformer, DOWN_UP, alpha, width, rank),
        "kohya": make_native_file(lambda n: f"lora_unet_{underscored(n)}", DOWN_UP, alpha, width, rank),
        "comfyui": make_native_file(lambda n: f"diffusion_model.{n}", DOWN_UP, alpha, width, rank),
        "comfyui-peft": make_native_file(lambda n: f"diffusion_model.{n}", AB, alpha, width, rank),
        "comfyui-diffusers": make_diffusers_file(lambda n: f"diffusion_model.{n}", AB, alpha, width, rank),
        "bare": make_diffusers_file(lambda n: n, AB, alpha, width, rank),
        "onetrainer": make_diffusers_file(lambda n: f"lora_transformer_{underscored(n)}", DOWN_UP, alpha, width, rank),  # noqa: E501
        "onetrainer-original": make_diffusers_file(numbered, DOWN_UP, alpha, width, rank),
        "lycoris": make_diffusers_file(lambda n: f"lycoris_{underscored(n)}", DOWN_UP, alpha, width, rank),
    }  # fmt: skip
