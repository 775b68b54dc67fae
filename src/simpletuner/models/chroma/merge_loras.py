"""Merge LoRAs into base weights, file to file and tensor by tensor.

Merging 18 GB takes the memory of a few matrices.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from simpletuner.adapters.deltas import Delta
from simpletuner.atomic_io import fsync_path
from simpletuner.errors import ConfigError, DiskFull, ModelError
from simpletuner.events.event_types import Emit
from simpletuner.events.sinks import null_emit
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.models.chroma import native_names, weights
from simpletuner.models.chroma.transformer import CLASS_NAME, TransformerConfig
from simpletuner.quantization.convert import DTYPE_NAMES, StoredTensor

WeightedLoras = Sequence[tuple[Mapping[str, Delta], float]]  # (deltas by module, weight)
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SHARD_BYTES = 10 * 10**9
# ComfyUI's marker of scaled fp8; a tensor of two elements means that matmuls are not done in fp8.
SCALED_FP8_KEY = "scaled_fp8"


@dataclass(frozen=True)
class MergeOutput:
    """Where and how the result is written.

    native_format: one file with the author's names, else a diffusers folder. dtype: None keeps the
    stored dtypes. float8_e4m3fn, only for the native format, quantizes the matrices of the blocks
    with one scale each; the rest is bfloat16. overwrite: an existing file or folder may be
    replaced.
    """

    path: Path
    native_format: bool
    dtype: torch.dtype | None = torch.bfloat16
    overwrite: bool = False


@dataclass(frozen=True)
class OutputTensor:
    """One output tensor: tensors of the base, concatenated along their rows."""

    source_names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def merge_loras(
    base: Path,
    loras: WeightedLoras,
    destination: MergeOutput,
    metadata: Mapping[str, str],
    emit: Emit = null_emit,
    variant: str = "",
) -> None:
    """Write `base` plus the delta of every LoRA, each computed from the unmodified base.

    base: a transformer's folder or single file. The result gets its final name only after it was
    written completely and read back; an interrupted merge leaves .NAME.partial, which the next one
    removes. Raises DiskFull or ModelError before anything is written.
    """
    base_tensors = weights.transformer_tensors(base, variant)
    config = weights.read_transformer_config(base)
    _check_shapes(base_tensors, loras)
    outputs = _plan_output_tensors(base_tensors, destination)
    total = sum(output.size_bytes for output in outputs.values())
    if destination.path.exists() and not destination.overwrite:
        raise ConfigError(f"{destination.path} already exists; choose another --output")
    if total + (64 << 20) > (free := shutil.disk_usage(destination.path.parent).free):
        folder = destination.path.parent
        raise DiskFull(
            f"{folder} has {free / 1e9:.1f} GB free, but the result needs {total / 1e9:.1f} GB"
        )
    work_folder = destination.path.with_name(f".{destination.path.name}.partial")
    work_folder.mkdir(exist_ok=True)
    lock = os.open(work_folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in work_folder.iterdir():
            leftover.unlink()
        with StageReporter(emit, "merge", total >> 20, "MiB") as stage:
            _write_output(
                work_folder, outputs, base_tensors, config, loras, destination, metadata, stage
            )
        result = work_folder / destination.path.name if destination.native_format else work_folder
        weights.transformer_tensors(result)
        _move_into_place(result, destination)
    except BlockingIOError:
        raise ConfigError(f"another process is writing {destination.path}") from None
    except OSError as error:
        raise DiskFull(f"{destination.path} could not be written ({error.strerror})") from error
    finally:
        os.close(lock)
        shutil.rmtree(work_folder, ignore_errors=True)


def _check_shapes(base_tensors: Mapping[str, StoredTensor], loras: WeightedLoras) -> None:
    for deltas, _ in loras:
        for name, delta in deltas.items():
            shape = (
                base_tensors[f"{name}.weight"].shape if f"{name}.weight" in base_tensors else None
            )
            if shape != delta.shape:
                mismatch = (
                    f"{name} is {delta.shape} in it and {shape} in the base"
                    if shape
                    else f"the base does not have {name}"
                )
                raise ModelError(f"a LoRA was trained on another model: {mismatch}")


def _plan_output_tensors(
    base_tensors: Mapping[str, StoredTensor], destination: MergeOutput
) -> dict[str, OutputTensor]:
    """Return the output tensors by name, with their source tensors, shape and dtype."""
    groups = (
        native_names.group_by_native_name(base_tensors)
        if destination.native_format
        else {name: (name,) for name in base_tensors}
    )
    outputs = {}
    for name, parts in groups.items():
        first = base_tensors[parts[0]]
        shape = (sum(base_tensors[part].shape[0] for part in parts), *first.shape[1:])
        scaled = (
            destination.dtype == FP8
            and len(shape) == 2
            and parts[0].startswith(weights.BLOCK_PREFIXES)
        )
        dtype = (
            FP8
            if scaled
            else torch.bfloat16
            if destination.dtype == FP8
            else destination.dtype or first.dtype
        )
        outputs[name] = OutputTensor(parts, shape, dtype)
        if scaled:
            outputs[f"{name.removesuffix('.weight')}.scale_weight"] = OutputTensor(
                (), (), torch.float32
            )
    return outputs


def _write_output(
    folder: Path,
    outputs: Mapping[str, OutputTensor],
    base_tensors: Mapping[str, StoredTensor],
    config: TransformerConfig,
    loras: WeightedLoras,
    destination: MergeOutput,
    metadata: Mapping[str, str],
    stage: StageReporter,
) -> None:
    header_metadata = {**metadata, "format": "pt"}
    if destination.native_format:
        marker = {SCALED_FP8_KEY: OutputTensor((), (2,), FP8)} if destination.dtype == FP8 else {}
        header_metadata |= native_names.config_metadata(config)
        _write_safetensors(
            folder / destination.path.name,
            {**outputs, **marker},
            base_tensors,
            loras,
            header_metadata,
            stage,
        )
        return
    shards = _split_into_shards(outputs)
    file_by_name = {name: file for file, names in shards.items() for name in names}
    fields = {"_class_name": CLASS_NAME, **asdict(config)}
    _write_json(folder / "config.json", fields)
    if len(shards) > 1:
        total = sum(output.size_bytes for output in outputs.values())
        index = {"metadata": {"total_size": total}, "weight_map": file_by_name}
        _write_json(folder / f"{weights.WEIGHTS_STEM}.safetensors.index.json", index)
    for file, names in shards.items():
        _write_safetensors(
            folder / file,
            {name: outputs[name] for name in names},
            base_tensors,
            loras,
            header_metadata,
            stage,
        )


def _split_into_shards(outputs: Mapping[str, OutputTensor]) -> dict[str, list[str]]:
    """Return file -> tensors in order, named and split as diffusers does."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, output in outputs.items():
        if groups[-1] and size + output.size_bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += output.size_bytes
    suffixes = [f"-{number:05d}-of-{len(groups):05d}" for number in range(1, len(groups) + 1)]
    shard_suffixes = suffixes if len(groups) > 1 else [""]
    return {
        f"{weights.WEIGHTS_STEM}{name}.safetensors": group
        for name, group in zip(shard_suffixes, groups, strict=True)
    }


def _write_safetensors(
    path: Path,
    outputs: Mapping[str, OutputTensor],
    base_tensors: Mapping[str, StoredTensor],
    loras: WeightedLoras,
    metadata: Mapping[str, str],
    stage: StageReporter,
) -> None:
    """Write the header first, then each tensor at its position.

    Tensors are ordered by element size, largest first, so that all are aligned.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end, starts = 0, {}
    for name in sorted(outputs, key=lambda name: -outputs[name].dtype.itemsize):
        output, starts[name] = outputs[name], end
        end += output.size_bytes
        dtype_name, offsets = DTYPE_NAMES[output.dtype], [starts[name], end]
        entries[name] = {"dtype": dtype_name, "shape": output.shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(begin + end)
        for name, output in outputs.items():
            if not output.source_names:  # a scale is written with its matrix; the marker is zeros
                continue
            merged = torch.cat(
                [_merge_tensor(part, base_tensors[part], loras) for part in output.source_names]
            )
            if output.dtype == FP8:
                scale = (merged.abs().amax() / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
                merged = merged.float().div_(scale)
                stem = name.removesuffix(".weight")
                _write_at(file, begin + starts[f"{stem}.scale_weight"], scale.float())
            merged = merged.to(output.dtype)
            if not bool(merged.float().isfinite().all()):
                raise ModelError(
                    f"{name} holds a value that is not finite in {DTYPE_NAMES[output.dtype]}"
                )
            _write_at(file, begin + starts[name], merged)
            stage.advance(max(0, (file.tell() >> 20) - stage.done))
        file.flush()
        os.fsync(file.fileno())


@torch.no_grad()
def _merge_tensor(name: str, stored: StoredTensor, loras: WeightedLoras) -> Tensor:
    """Return a tensor as stored, or in float32 when a delta is added."""
    weight, module = stored.load(), name.removesuffix(".weight")
    own_deltas = [(deltas[module], strength) for deltas, strength in loras if module in deltas]
    if not own_deltas or module == name:
        return weight
    base = weight.to(torch.promote_types(weight.dtype, torch.float32))
    merged = base.clone()
    for delta, strength in own_deltas:
        if delta.magnitude is None:
            delta.add_to(merged, strength)
            continue
        # DoRA (arXiv 2402.09353): rows of the adapted matrix are rescaled to trained norms.
        adapted = base.clone()
        delta.add_to(adapted, 1.0)
        norms = torch.linalg.vector_norm(adapted, dim=1, keepdim=True)
        merged += strength * (adapted * (delta.magnitude.to(base)[:, None] / norms) - base)
    return merged


def _write_at(file: BinaryIO, position: int, tensor: Tensor) -> None:
    file.seek(position)
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_json(path: Path, fields: Mapping[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_into_place(result: Path, destination: MergeOutput) -> None:
    if destination.path.exists() and not destination.overwrite:
        raise ConfigError(
            f"{destination.path} was created in the meantime; choose another --output"
        )
    os.replace(result, destination.path)
    fsync_path(destination.path.parent)
