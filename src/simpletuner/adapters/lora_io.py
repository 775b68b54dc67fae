"""Writing a LoRA that other programs load at its right strength, and proof of it before it gets its name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.adapters import compatibility, layouts
from simpletuner.adapters.adapted_linear import AdaptedLinear, adapted_modules
from simpletuner.adapters.attachment import attach_adapter_from_file
from simpletuner.adapters.deltas import Delta, LycorisDelta
from simpletuner.adapters.layouts import LAYOUTS, LoraFile, LoraFileSummary
from simpletuner.atomic_io import fsync_path
from simpletuner.errors import DiskFull, ModelError

PROBE_VECTORS = 8
# What rounding to a number type may change, as a share of a delta's larger terms.
TOLERANCES = MappingProxyType({torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2})
# Layouts that are written -> the programs that must apply them as trained.
TARGET_PROGRAMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "diffusers": ("diffusers", "comfyui"),
        "kohya": ("kohya", "forge", "comfyui"),
        "comfyui": ("comfyui", "forge"),
        "lycoris": ("comfyui", "forge"),
    }
)
ExpectedDeltas = Mapping[str, Delta | AdaptedLinear]  # what a file is compared with


def save_adapter(
    transformer: nn.Module,
    path: Path,
    metadata: Mapping[str, str] | None = None,
    layout: str | None = None,
) -> LoraFileSummary:
    """Write the adapter to `path` (its folder exists): temporary name, fsync, read back, rename.

    Read back means: by the rules of each program that the layout is meant for, compared with the live delta
    of each module on random inputs in float64. A module that would not be applied, or a relative difference
    above 1e-6, is a ModelError, no room is a DiskFull; either way the file before keeps its name.
    layout: None is "lycoris" for LoHa and LoKr, else "diffusers".
    metadata: free strings (modelspec.title, ...); of a value that is a local path the last part is written.
    """
    modules = adapted_modules(transformer)
    if not modules:
        raise ModelError(f"nothing to save to {path}: the network has no adapter")
    deltas = {name: module.to_delta() for name, module in modules.items()}
    product = any(isinstance(one, LycorisDelta) for one in deltas.values())
    layout = layout or ("lycoris" if product else "diffusers")
    return _save_verified(path, deltas, modules, layout, torch.float32, metadata or {})


def save_deltas(
    deltas: Mapping[str, Delta],
    path: Path,
    layout: str,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> LoraFileSummary:
    """The same for what belongs to no network."""
    return _save_verified(path, deltas, deltas, layout, dtype, metadata)


def path_with_layout(path: Path, layout: str) -> Path:
    """pytorch_lora_weights.safetensors -> pytorch_lora_weights.kohya.safetensors"""
    return path.with_name(f"{path.stem}.{layout}{path.suffix}")


def load_adapter(transformer: nn.Module, path: Path, strength: float = 1.0) -> LoraFileSummary:
    """Adapt a network by a file (or a folder that holds one) with its modules and ranks, frozen.

    Refuses a network with an adapter, modules it lacks, other sizes (ModelError).
    """
    return attach_adapter_from_file(transformer, path, strength)


def read_summary(path: Path) -> LoraFileSummary:
    """What a file holds, without a network."""
    return layouts.read_lora_file(path).to_deltas_and_summary()[1]


def _save_verified(
    path: Path,
    deltas: Mapping[str, Delta],
    meant: ExpectedDeltas,
    layout: str,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> LoraFileSummary:
    header = {"format": "pt", **{key: _strip_local_path(value) for key, value in metadata.items()}}
    if layouts.PEFT_CONFIG_KEY in header:
        raise ModelError(
            f"{layouts.PEFT_CONFIG_KEY} must not be in the header: loaders disagree about it"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(_delta_tensors(deltas, layout, dtype), temporary, metadata=header)
        fsync_path(temporary)
        written = _verify_file(temporary, meant, layout, TOLERANCES[dtype])
        os.replace(temporary, path)
        fsync_path(path.parent)
    except (OSError, SafetensorError) as error:  # a full disk is the latter inside save_file
        raise DiskFull(f"{path} could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return written.to_deltas_and_summary()[1]


def _delta_tensors(
    deltas: Mapping[str, Delta], layout: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Alpha is folded into B; programs that ask for an alpha get the rank, which changes nothing."""
    to = LAYOUTS[layout]
    tensors: dict[str, Tensor] = {}
    for name, one in (layouts.fuse_qkv(deltas) if to.uses_native_names else deltas).items():
        key = to.key_for(name)
        if isinstance(one, LycorisDelta):
            tensors |= _lycoris_tensors(key, one, layout, dtype)
            continue
        tensors[key + to.down_suffix] = one.down.to(dtype, copy=True).contiguous()
        tensors[key + to.up_suffix] = one.up.to(dtype, copy=True).contiguous()
        if to.suffixes != LAYOUTS["diffusers"].suffixes:
            tensors[key + layouts.ALPHA_SUFFIX] = torch.tensor(float(one.rank))
        if one.magnitude is not None:
            tensors[key + layouts.MAGNITUDE_SUFFIX] = one.magnitude.contiguous()
    return tensors


def _lycoris_tensors(
    key: str, one: LycorisDelta, layout: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """As LyCORIS writes it; its alpha is the rank where the rank says nothing."""
    if layout != "lycoris" or one.shape[0] < one.total_rows:
        where = (
            f"the layout {LAYOUTS[layout].title}"
            if layout != "lycoris"
            else "rows of a fused matrix"
        )
        near = "with --rank N simpletuner export writes a LoRA near it"
        raise ModelError(f"a {one.kind} has no exact form in {where}; {near}")
    parts = {
        f"{key}.{name}": part.to(dtype, copy=True).contiguous()
        for name, part in one.factors.items()
    }
    return {
        **parts,
        key + layouts.ALPHA_SUFFIX: torch.tensor(one.scale * one.rank if one.rank else 1.0),
    }


def _verify_file(temporary: Path, meant: ExpectedDeltas, layout: str, tolerance: float) -> LoraFile:
    try:
        file = layouts.read_lora_file(temporary)
    except ModelError as error:
        raise ModelError(f"the saved LoRA would not be read: {error}") from error
    dora = any(one.magnitude is not None for one in meant.values())
    for name in ("diffusers",) if dora else TARGET_PROGRAMS[layout]:
        program = compatibility.CONSUMER_PROGRAMS[name]
        if refusal := compatibility.predict_load(program, file).refusal:
            raise ModelError(f"the saved LoRA would be refused by {program.title}: {refusal}")
        _compare_deltas(
            program.title,
            compatibility.applied_deltas(program, file),
            meant,
            tolerance,
            LAYOUTS[layout].uses_native_names,
        )
    return file


@torch.no_grad()
def _compare_deltas(
    program: str, found: Mapping[str, Delta], meant: ExpectedDeltas, tolerance: float, native: bool
) -> None:
    """native: rows of zeros may stand for a module that is not adapted, and the other way round."""
    unmatched = sorted(set(found) ^ set(meant))
    if native:
        either = {**meant, **found}
        unmatched = [
            name for name in unmatched if any(term.any() for term in _probe_outputs(either[name]))
        ]
    if unmatched:
        more = f"{unmatched[0]} ({len(unmatched)} in all)"
        raise ModelError(f"the saved LoRA would not be applied to {more} by {program}")
    for name in set(found) & set(meant):
        error = _relative_error(meant[name], found[name])
        if not error <= tolerance:
            what = f"{name} in {program}: relative difference {error:.1e}"
            raise ModelError(f"the saved LoRA would act differently on {what}")


def _relative_error(meant: Delta | AdaptedLinear, applied: Delta) -> float:
    """Largest difference of delta W p over random p, relative to the delta's larger terms; inf for NaN.

    Products with a few vectors see every difference that the full matrices would, at 1/1000 of the cost.
    """
    if meant.shape != applied.shape:
        return float("inf")
    terms, theirs = _probe_outputs(meant), _probe_outputs(applied)
    scale = max(float(term.abs().max()) for term in terms)
    error = float(torch.stack([*theirs, *(-term for term in terms)]).sum(0).abs().max())
    if meant.magnitude is not None:
        lengths = meant.magnitude.cpu().flatten()
        same = applied.magnitude is not None and torch.equal(applied.magnitude, lengths)
        error = error if same else float("inf")
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0 else float("inf")


def _probe_outputs(one: Delta | AdaptedLinear) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return one.output_terms(
        torch.randn(one.shape[1], PROBE_VECTORS, generator=generator, dtype=torch.float64)
    )


def _strip_local_path(value: str) -> str:
    local = re.match(r"([~/\\]|\.\.?[/\\]|[A-Za-z]:[/\\])", value)
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if local else value
