"""Single files as people hold them, made from a small checkpoint."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.models.chroma.native_names import group_by_native_name

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
StateDict = dict[str, Tensor]


def diffusers_state(checkpoint: Path) -> StateDict:
    return load_file(checkpoint / "transformer" / WEIGHTS_FILE)


def native_state(state: Mapping[str, Tensor]) -> StateDict:
    return {
        name: torch.cat([state[part] for part in parts])
        for name, parts in group_by_native_name(state).items()
    }


def write_safetensors(
    path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def to_fp8(
    state: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float8_e4m3fn,
    scaled: bool | str = False,
) -> StateDict:
    """Every matrix in fp8 as ComfyUI's files have them, vectors in bfloat16. scaled: "rows" is each
    row.
    """
    result: StateDict = {"scaled_fp8": torch.empty(0, dtype=dtype)} if scaled else {}
    for name, tensor in state.items():
        if tensor.dim() < 2:
            result[name] = tensor.bfloat16()
            continue
        scale = tensor.float().abs().max() / 448 if scaled else torch.tensor(1.0)
        if scaled == "rows" and tensor.dim() == 2:
            scale = tensor.float().abs().amax(1, keepdim=True) / 448
        result[name] = (tensor.float() / scale).to(dtype)
        if scaled:
            result[f"{name.removesuffix('.weight')}.scale_weight"] = scale
            result[f"{name.removesuffix('.weight')}.scale_input"] = torch.tensor(1.0)
    return result


def dequantize_fp8(state: Mapping[str, Tensor], scaled: bool | str) -> StateDict:
    """What such a file means, by another way than the reader's: in float64, rounded once."""
    found = {}
    for name, tensor in state.items():
        if name.endswith((".scale_weight", ".scale_input")) or name == "scaled_fp8":
            continue
        scale = state.get(f"{name.removesuffix('.weight')}.scale_weight") if scaled else None
        exact = tensor.to(torch.float64) * (
            1.0 if scale is None or tensor.dim() < 2 else scale.double()
        )
        found[name] = exact.to(torch.bfloat16)
    return found


def gguf_bytes(
    tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]],
    texts: Mapping[str, str] | None = None,
) -> bytes:
    """name -> (shape as torch has it, GGML type, bytes). Written from the format's description."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    values = texts or {"general.architecture": "flux"}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, value in values.items():
        head += text(key) + struct.pack("<I", 8) + text(value)
    body = b""
    for name, (shape, kind, raw) in tensors.items():
        body += b"\0" * (-len(body) % 32)
        head += text(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        head += struct.pack("<IQ", kind, len(body))
        body += raw
    return head + b"\0" * (-len(head) % 32) + body


def write_gguf(
    path: Path, state: Mapping[str, Tensor], pack: Callable[[Tensor], tuple[int, bytes]]
) -> Path:
    path.write_bytes(gguf_bytes({name: (tuple(t.shape), *pack(t)) for name, t in state.items()}))
    return path


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
