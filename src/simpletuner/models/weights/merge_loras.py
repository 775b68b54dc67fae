"""Merge LoRAs into base weights, file to file and tensor by tensor.

Merging 18 GB takes the memory of a few matrices.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from simpletuner.models.weights.tensor_files import split_into_files
from simpletuner.quantization.stored_tensor import DTYPE_NAMES, StoredTensor

WeightedLoras = Sequence[tuple[Mapping[str, Delta], float]]  # (deltas by module, weight)
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SHARD_BYTES = 10 * 10**9
# ComfyUI's marker of scaled fp8; a tensor of two elements means that matmuls are not done in fp8.
SCALED_FP8_KEY = "scaled_fp8"


@dataclass(frozen=True)
class MergeOutput:
    """Path and form of the result.

    native_format: one file with the author's names, else a diffusers folder. dtype: None keeps the
    stored dtypes. float8_e4m3fn, only for the native format, quantizes every matrix with one scale
    each, and vectors are bfloat16: ComfyUI up to 0.3.64 casts all linears of a file with scaled fp8
    to fp8, so that one without a scale would be rounded without it. overwrite: an existing file or
    folder may be replaced.
    """

    path: Path
    native_format: bool
    dtype: torch.dtype | None = torch.bfloat16
    overwrite: bool = False


@dataclass(frozen=True)
class MergeFormat:
    """The facts that a merge needs about an architecture.

    read_tensors: takes a transformer's folder or file and a variant, and checks that it is
    complete. read_config: the fields of config.json. native_metadata: the metadata of a native
    file, made of these fields. group_by_native_name: diffusers' names -> native name with its parts
    in the order of rows. weights_stem: name of weight files.
    """

    read_tensors: Callable[[Path, str], Mapping[str, StoredTensor]]
    read_config: Callable[[Path], dict[str, object]]
    native_metadata: Callable[[Path], dict[str, str]]
    group_by_native_name: Callable[[Iterable[str]], dict[str, tuple[str, ...]]]
    weights_stem: str


@dataclass(frozen=True)
class OutputTensor:
    """One output tensor: tensors of the base, concatenated along their rows."""

    source_names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def merge_loras(
    model: MergeFormat,
    base: Path,
    loras: WeightedLoras,
    destination: MergeOutput,
    metadata: Mapping[str, str],
    emit: Emit = null_emit,
    variant: str = "",
) -> None:
    """Write `base` plus the delta of every LoRA, each computed from the unmodified base.

    model: the architecture's facts. base: a transformer's folder or single file. The result gets
    its final name only after it was written completely and read back; an interrupted merge leaves
    .NAME.partial, which the next one removes. Raises DiskFull or ModelError before anything is
    written.
    """
    base_tensors = model.read_tensors(base, variant)
    _check_shapes(base_tensors, loras)
    outputs = _plan_output_tensors(model, base_tensors, destination)
    total = sum(output.size_bytes for output in outputs.values())
    if destination.path.exists() and not destination.overwrite:
        raise ConfigError(f"{destination.path} already exists; choose another --output")
    _check_free_space(destination.path.parent, total)
    work_folder = destination.path.with_name(f".{destination.path.name}.partial")
    work_folder.mkdir(exist_ok=True)
    lock = os.open(work_folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in work_folder.iterdir():
            leftover.unlink()
        with StageReporter(emit, "merge", total >> 20, "MiB") as stage:
            writer = _TensorWriter(outputs, base_tensors, loras, stage)
            _write_output(model, base, work_folder, writer, destination, metadata)
        result = work_folder / destination.path.name if destination.native_format else work_folder
        model.read_tensors(result, "")
        _move_into_place(result, destination)
    except BlockingIOError:
        raise ConfigError(f"another process is writing {destination.path}") from None
    except OSError as error:
        raise DiskFull(f"{destination.path} could not be written ({error.strerror})") from error
    finally:
        os.close(lock)
        shutil.rmtree(work_folder, ignore_errors=True)


def _check_free_space(folder: Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    if total + (64 << 20) > free:
        raise DiskFull(
            f"{folder} has {free / 1e9:.1f} GB free, but the result needs {total / 1e9:.1f} GB"
        )


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
    model: MergeFormat, base_tensors: Mapping[str, StoredTensor], destination: MergeOutput
) -> dict[str, OutputTensor]:
    """Return the output tensors by name, with their source tensors, shape and dtype."""
    groups = (
        model.group_by_native_name(base_tensors)
        if destination.native_format
        else {name: (name,) for name in base_tensors}
    )
    outputs = {}
    for name, parts in groups.items():
        first = base_tensors[parts[0]]
        shape = (sum(base_tensors[part].shape[0] for part in parts), *first.shape[1:])
        scaled = destination.dtype == FP8 and len(shape) == 2 and name.endswith(".weight")
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
    model: MergeFormat,
    base: Path,
    folder: Path,
    writer: _TensorWriter,
    destination: MergeOutput,
    metadata: Mapping[str, str],
) -> None:
    header_metadata = {**metadata, "format": "pt"}
    if destination.native_format:
        if destination.dtype == FP8:
            writer.outputs[SCALED_FP8_KEY] = OutputTensor((), (2,), FP8)
        header_metadata |= model.native_metadata(base)
        writer.write(folder / destination.path.name, list(writer.outputs), header_metadata)
        return
    sizes = {name: output.size_bytes for name, output in writer.outputs.items()}
    shards = split_into_files(model.weights_stem, sizes, SHARD_BYTES)
    file_by_name = {name: file for file, names in shards.items() for name in names}
    _write_json(folder / "config.json", model.read_config(base))
    if len(shards) > 1:
        total = sum(output.size_bytes for output in writer.outputs.values())
        index = {"metadata": {"total_size": total}, "weight_map": file_by_name}
        _write_json(folder / f"{model.weights_stem}.safetensors.index.json", index)
    for file, names in shards.items():
        writer.write(folder / file, names, header_metadata)


@dataclass(frozen=True)
class _TensorWriter:
    """Computes merged tensors one by one and writes them into safetensors files."""

    outputs: dict[str, OutputTensor]
    base_tensors: Mapping[str, StoredTensor]
    loras: WeightedLoras
    stage: StageReporter

    def write(self, path: Path, names: Sequence[str], metadata: Mapping[str, str]) -> None:
        """Write the header first, then each of the tensors at its position."""
        header, positions, size = self._layout(names, metadata)
        with path.open("wb") as file:
            file.write(header)
            file.truncate(size)
            for name in names:
                # A scale is written with its matrix, and the marker of scaled fp8 is zeros.
                if self.outputs[name].source_names:
                    self._write_tensor(file, name, positions)
                    self.stage.advance(max(0, (file.tell() >> 20) - self.stage.done))
            file.flush()
            os.fsync(file.fileno())

    def _layout(
        self, names: Sequence[str], metadata: Mapping[str, str]
    ) -> tuple[bytes, dict[str, int], int]:
        """Return header, position of each tensor, and file size.

        Tensors are ordered by element size, largest first, so that all are aligned.
        """
        entries: dict[str, object] = {"__metadata__": dict(metadata)}
        starts = {}
        end = 0
        for name in sorted(names, key=lambda name: -self.outputs[name].dtype.itemsize):
            output = self.outputs[name]
            starts[name] = end
            end += output.size_bytes
            entries[name] = {
                "dtype": DTYPE_NAMES[output.dtype],
                "shape": output.shape,
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        positions = {name: len(header) + start for name, start in starts.items()}
        return header, positions, len(header) + end

    def _write_tensor(self, file: BinaryIO, name: str, positions: Mapping[str, int]) -> None:
        output = self.outputs[name]
        merged = torch.cat(
            [
                _merge_tensor(part, self.base_tensors[part], self.loras)
                for part in output.source_names
            ]
        )
        if output.dtype == FP8:
            scale = (merged.abs().amax() / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
            merged = merged.float().div_(scale)
            stem = name.removesuffix(".weight")
            _write_at(file, positions[f"{stem}.scale_weight"], scale.float())
        merged = merged.to(output.dtype)
        if not bool(merged.float().isfinite().all()):
            raise ModelError(
                f"{name} holds a value that is not finite in {DTYPE_NAMES[output.dtype]}"
            )
        _write_at(file, positions[name], merged)


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
        # DoRA (arXiv 2402.09353): rows, or columns, of the adapted matrix are rescaled to trained
        # norms.
        adapted = base.clone()
        delta.add_to(adapted, 1.0)
        wanted = delta.magnitude.to(base)
        per_input = wanted.ndim == 2
        norms = torch.linalg.vector_norm(adapted, dim=0 if per_input else 1, keepdim=True)
        wanted = wanted if per_input else wanted[:, None]
        merged += strength * (adapted * (wanted / norms) - base)
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
