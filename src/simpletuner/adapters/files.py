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

from simpletuner.adapters import layouts, loaders
from simpletuner.adapters.deltas import Delta, Product
from simpletuner.adapters.layouts import LAYOUTS, FileSummary, LoraFile
from simpletuner.adapters.linear import AdaptedLinear, adapted
from simpletuner.adapters.lora import attach_file
from simpletuner.durable import sync
from simpletuner.errors import DiskFull, ModelError

PROBES = 8
# What rounding to a number type may change, as a share of a delta's larger terms.
TOLERANCE = MappingProxyType({torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2})
# Layouts that are written -> the programs that must apply them as trained.
MEANT_FOR: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "diffusers": ("diffusers", "comfyui"),
    "kohya": ("kohya", "forge", "comfyui"),
    "comfyui": ("comfyui", "forge"),
    "lycoris": ("comfyui", "forge"),
})  # fmt: skip
Meant = Mapping[str, Delta | AdaptedLinear]  # what a file is compared with


def save(
    transformer: nn.Module, path: Path, metadata: Mapping[str, str] | None = None, layout: str | None = None
) -> FileSummary:
    """Write the adapter to `path` (its folder exists): temporary name, fsync, read back, rename.

    Read back means: by the rules of each program that the layout is meant for, compared with the live delta
    of each module on random inputs in float64. A module that would not be applied, or a relative difference
    above 1e-6, is a ModelError, no room is a DiskFull; either way the file before keeps its name.
    layout: None is "lycoris" for LoHa and LoKr, else "diffusers".
    metadata: free strings (modelspec.title, ...); of a value that is a local path the last part is written.
    """
    modules = adapted(transformer)
    if not modules:
        raise ModelError(f"nothing to save to {path}: the network has no adapter")
    deltas = {name: module.delta() for name, module in modules.items()}
    product = any(isinstance(one, Product) for one in deltas.values())
    layout = layout or ("lycoris" if product else "diffusers")
    return _write(path, deltas, modules, layout, torch.float32, metadata or {})


def write(
    deltas: Mapping[str, Delta], path: Path, layout: str, dtype: torch.dtype, metadata: Mapping[str, str]
) -> FileSummary:
    """The same for what belongs to no network."""
    return _write(path, deltas, deltas, layout, dtype, metadata)


def beside(path: Path, layout: str) -> Path:
    """pytorch_lora_weights.safetensors -> pytorch_lora_weights.kohya.safetensors"""
    return path.with_name(f"{path.stem}.{layout}{path.suffix}")


def load_into(transformer: nn.Module, path: Path, strength: float = 1.0) -> FileSummary:
    """Adapt a network by a file (or a folder that holds one) with its modules and ranks, frozen.

    Refuses a network with an adapter, modules it lacks, other sizes (ModelError).
    """
    return attach_file(transformer, path, strength)


def describe(path: Path) -> FileSummary:
    """What a file holds, without a network."""
    return layouts.read(path).opened()[1]


def _write(
    path: Path, deltas: Mapping[str, Delta], meant: Meant, layout: str, dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> FileSummary:  # fmt: skip
    header = {"format": "pt", **{key: _without_path(value) for key, value in metadata.items()}}
    if layouts.HEADER_CONFIG in header:
        raise ModelError(f"{layouts.HEADER_CONFIG} must not be in the header: loaders disagree about it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(_tensors(deltas, layout, dtype), temporary, metadata=header)
        sync(temporary)
        written = _verify(temporary, meant, layout, TOLERANCE[dtype])
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:  # a full disk is the latter inside save_file
        raise DiskFull(f"{path} could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return written.opened()[1]


def _tensors(deltas: Mapping[str, Delta], layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """alpha is folded into B; programs that ask for an alpha get the rank, which changes nothing."""
    to = LAYOUTS[layout]
    tensors: dict[str, Tensor] = {}
    for name, one in (layouts.fused(deltas) if to.native else deltas).items():
        key = to.key(name)
        if isinstance(one, Product):
            tensors |= _of_product(key, one, layout, dtype)
            continue
        tensors[key + to.down] = one.down.to(dtype, copy=True).contiguous()
        tensors[key + to.up] = one.up.to(dtype, copy=True).contiguous()
        if to.ends != LAYOUTS["diffusers"].ends:
            tensors[key + layouts.ALPHA] = torch.tensor(float(one.rank))
        if one.magnitude is not None:
            tensors[key + layouts.MAGNITUDE] = one.magnitude.contiguous()
    return tensors


def _of_product(key: str, one: Product, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """As LyCORIS writes it; its alpha is the rank where the rank says nothing."""
    if layout != "lycoris" or one.shape[0] < one.height:
        where = f"the layout {LAYOUTS[layout].title}" if layout != "lycoris" else "rows of a fused matrix"
        near = "with --rank N simpletuner export writes a LoRA near it"
        raise ModelError(f"a {one.kind} has no exact form in {where}; {near}")
    parts = {f"{key}.{name}": part.to(dtype, copy=True).contiguous() for name, part in one.parts.items()}
    return {**parts, key + layouts.ALPHA: torch.tensor(one.scale * one.rank if one.rank else 1.0)}


def _verify(temporary: Path, meant: Meant, layout: str, tolerance: float) -> LoraFile:
    try:
        file = layouts.read(temporary)
    except ModelError as error:
        raise ModelError(f"the saved LoRA would not be read: {error}") from error
    dora = any(one.magnitude is not None for one in meant.values())
    for name in ("diffusers",) if dora else MEANT_FOR[layout]:
        program = loaders.PROGRAMS[name]
        if refusal := loaders.reading(program, file).refusal:
            raise ModelError(f"the saved LoRA would be refused by {program.title}: {refusal}")
        _compare(program.title, loaders.applied(program, file), meant, tolerance, LAYOUTS[layout].native)
    return file


@torch.no_grad()
def _compare(program: str, found: Mapping[str, Delta], meant: Meant, tolerance: float, native: bool) -> None:
    """native: rows of zeros may stand for a module that is not adapted, and the other way round."""
    unmatched = sorted(set(found) ^ set(meant))
    if native:
        either = {**meant, **found}
        unmatched = [name for name in unmatched if any(term.any() for term in _probed(either[name]))]
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
    terms, theirs = _probed(meant), _probed(applied)
    scale = max(float(term.abs().max()) for term in terms)
    error = float(torch.stack([*theirs, *(-term for term in terms)]).sum(0).abs().max())
    if meant.magnitude is not None:
        lengths = meant.magnitude.cpu().flatten()
        same = applied.magnitude is not None and torch.equal(applied.magnitude, lengths)
        error = error if same else float("inf")
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0 else float("inf")


def _probed(one: Delta | AdaptedLinear) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return one.terms(torch.randn(one.shape[1], PROBES, generator=generator, dtype=torch.float64))


def _without_path(value: str) -> str:
    local = re.match(r"([~/\\]|\.\.?[/\\]|[A-Za-z]:[/\\])", value)
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if local else value
