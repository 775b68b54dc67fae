"""LoRAs into a base, file to file and tensor by tensor: 18 GB are merged in the memory of a few matrices."""

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

WeightedLoras = Sequence[tuple[Mapping[str, Delta], float]]  # each with its weight
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SHARD_BYTES = 10 * 10**9
# ComfyUI's sign of a file with scaled fp8; two entries mean that products are not to be taken in fp8.
SCALED_FP8_KEY = "scaled_fp8"


@dataclass(frozen=True)
class MergeOutput:
    """native: one file with the author's names; otherwise a folder as diffusers has it.

    dtype: None is as stored. float8_e4m3fn, native only: the blocks' matrices, each with one scale; the rest
    is bfloat16. replace: an older file or folder may be in the place.
    """

    path: Path
    native_format: bool
    dtype: torch.dtype | None = torch.bfloat16
    overwrite: bool = False


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result: these of the base, one below the other."""

    source_names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def merge_loras(
    base: Path,
    loras: WeightedLoras,
    target: MergeOutput,
    metadata: Mapping[str, str],
    emit: Emit = null_emit,
    variant: str = "",
) -> None:
    """Write `base` plus every LoRA's change of it, each counted from the untouched base.

    base: a transformer's folder or single file. The result has its name only when it is whole and read back;
    what a killed merge leaves is called .NAME.partial, and gone after the next. DiskFull or ModelError before
    anything is written.
    """
    found, config = (
        weights.transformer_tensors(base, variant),
        weights.read_transformer_config(base),
    )
    _check_shapes(found, loras)
    pieces = _plan_output_tensors(found, target)
    total = sum(piece.size_bytes for piece in pieces.values())
    if target.path.exists() and not target.overwrite:
        raise ConfigError(f"{target.path} exists and is not overwritten; name another")
    if total + (64 << 20) > (free := shutil.disk_usage(target.path.parent).free):
        where = target.path.parent
        raise DiskFull(
            f"{where} has room for {free / 1e9:.1f} GB; the result takes {total / 1e9:.1f} GB"
        )
    work = target.path.with_name(f".{target.path.name}.partial")
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in work.iterdir():
            leftover.unlink()
        with StageReporter(emit, "merge", total >> 20, "MiB") as stage:
            _write_output(work, pieces, found, config, loras, target, metadata, stage)
        whole = work / target.path.name if target.native_format else work
        weights.transformer_tensors(whole)
        _move_into_place(whole, target)
    except BlockingIOError:
        raise ConfigError(f"another process writes {target.path} at this moment") from None
    except OSError as error:
        raise DiskFull(f"{target.path} could not be written ({error.strerror})") from error
    finally:
        os.close(lock)
        shutil.rmtree(work, ignore_errors=True)


def _check_shapes(found: Mapping[str, StoredTensor], loras: WeightedLoras) -> None:
    for factors, _ in loras:
        for name, one in factors.items():
            shape = found[f"{name}.weight"].shape if f"{name}.weight" in found else None
            if shape != one.shape:
                what = f"{name} is {shape} here" if shape else f"there is no {name} here"
                raise ModelError(f"a LoRA was made for another model: {what}")


def _plan_output_tensors(
    found: Mapping[str, StoredTensor], target: MergeOutput
) -> dict[str, OutputTensor]:
    together = (
        native_names.group_by_native_name(found)
        if target.native_format
        else {name: (name,) for name in found}
    )
    pieces = {}
    for name, parts in together.items():
        first = found[parts[0]]
        shape = (sum(found[part].shape[0] for part in parts), *first.shape[1:])
        scaled = (
            target.dtype == FP8 and len(shape) == 2 and parts[0].startswith(weights.BLOCK_PREFIXES)
        )
        dtype = (
            FP8
            if scaled
            else torch.bfloat16
            if target.dtype == FP8
            else target.dtype or first.dtype
        )
        pieces[name] = OutputTensor(parts, shape, dtype)
        if scaled:
            pieces[f"{name.removesuffix('.weight')}.scale_weight"] = OutputTensor(
                (), (), torch.float32
            )
    return pieces


def _write_output(
    work: Path,
    pieces: Mapping[str, OutputTensor],
    found: Mapping[str, StoredTensor],
    config: TransformerConfig,
    loras: WeightedLoras,
    target: MergeOutput,
    metadata: Mapping[str, str],
    stage: StageReporter,
) -> None:
    told = {**metadata, "format": "pt"}
    if target.native_format:
        marked = {SCALED_FP8_KEY: OutputTensor((), (2,), FP8)} if target.dtype == FP8 else {}
        told |= native_names.config_metadata(config)
        _write_safetensors(work / target.path.name, {**pieces, **marked}, found, loras, told, stage)
        return
    shards = _split_into_shards(pieces)
    place = {name: file for file, names in shards.items() for name in names}
    fields = {"_class_name": CLASS_NAME, **asdict(config)}
    _write_json(work / "config.json", fields)
    if len(shards) > 1:
        total = sum(piece.size_bytes for piece in pieces.values())
        index = {"metadata": {"total_size": total}, "weight_map": place}
        _write_json(work / f"{weights.WEIGHTS_STEM}.safetensors.index.json", index)
    for file, names in shards.items():
        _write_safetensors(
            work / file, {name: pieces[name] for name in names}, found, loras, told, stage
        )


def _split_into_shards(pieces: Mapping[str, OutputTensor]) -> dict[str, list[str]]:
    """File -> tensors, in order, as diffusers names and cuts them."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, piece in pieces.items():
        if groups[-1] and size + piece.size_bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += piece.size_bytes
    of = [f"-{number:05d}-of-{len(groups):05d}" for number in range(1, len(groups) + 1)]
    names = of if len(groups) > 1 else [""]
    return {
        f"{weights.WEIGHTS_STEM}{name}.safetensors": group
        for name, group in zip(names, groups, strict=True)
    }


def _write_safetensors(
    path: Path,
    pieces: Mapping[str, OutputTensor],
    found: Mapping[str, StoredTensor],
    loras: WeightedLoras,
    metadata: Mapping[str, str],
    stage: StageReporter,
) -> None:
    """The header first, then each tensor at its place. Wide numbers first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at, starts = 0, {}
    for name in sorted(pieces, key=lambda name: -pieces[name].dtype.itemsize):
        piece, starts[name] = pieces[name], at
        at += piece.size_bytes
        spelled, offsets = DTYPE_NAMES[piece.dtype], [starts[name], at]
        entries[name] = {"dtype": spelled, "shape": piece.shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(begin + at)
        for name, piece in pieces.items():
            if not piece.source_names:  # a scale comes with its matrix, the mark is zeros
                continue
            merged = torch.cat(
                [_merge_tensor(part, found[part], loras) for part in piece.source_names]
            )
            if piece.dtype == FP8:
                scale = (merged.abs().amax() / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
                merged = merged.float().div_(scale)
                stem = name.removesuffix(".weight")
                _write_at(file, begin + starts[f"{stem}.scale_weight"], scale.float())
            merged = merged.to(piece.dtype)
            if not bool(merged.float().isfinite().all()):
                raise ModelError(
                    f"{name} holds a number that is not finite in {DTYPE_NAMES[piece.dtype]}"
                )
            _write_at(file, begin + starts[name], merged)
            stage.advance(max(0, (file.tell() >> 20) - stage.done))
        file.flush()
        os.fsync(file.fileno())


@torch.no_grad()
def _merge_tensor(name: str, stored: StoredTensor, loras: WeightedLoras) -> Tensor:
    """In float32 where anything is added, else as stored."""
    weight, module = stored.load(), name.removesuffix(".weight")
    mine = [(factors[module], strength) for factors, strength in loras if module in factors]
    if not mine or module == name:
        return weight
    base = weight.to(torch.promote_types(weight.dtype, torch.float32))
    changed = base.clone()
    for one, strength in mine:
        if one.magnitude is None:
            one.add_to(changed, strength)
            continue
        # DoRA (arXiv 2402.09353): rows of the adapted matrix get a length of their own.
        adapted = base.clone()
        one.add_to(adapted, 1.0)
        length = torch.linalg.vector_norm(adapted, dim=1, keepdim=True)
        changed += strength * (adapted * (one.magnitude.to(base)[:, None] / length) - base)
    return changed


def _write_at(file: BinaryIO, position: int, tensor: Tensor) -> None:
    file.seek(position)
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_json(path: Path, fields: Mapping[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_into_place(whole: Path, target: MergeOutput) -> None:
    if target.path.exists() and not target.overwrite:
        raise ConfigError(f"{target.path} has come into being meanwhile and is not overwritten")
    os.replace(whole, target.path)
    fsync_path(target.path.parent)
