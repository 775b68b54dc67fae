"""Writing a LoRA that other programs load at its right strength, and proof of it before it gets its name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.adapters import layouts, loaders
from simpletuner.adapters.layouts import LAYOUTS, Factors, FileSummary, LoraFile
from simpletuner.adapters.linear import AdaptedLinear, LoraLinear, adapted
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
})  # fmt: skip


@dataclass(frozen=True)
class Delta:
    """What a module is to add: the sum of up @ down over `terms`."""

    terms: tuple[tuple[Tensor, Tensor], ...]  # (down, up)
    magnitude: Tensor | None = None


def save(
    transformer: nn.Module, path: Path, metadata: Mapping[str, str] | None = None, layout: str = "diffusers"
) -> FileSummary:
    """Write the adapter to `path` (its folder exists): temporary name, fsync, read back, rename.

    Read back means: by the rules of each program that the layout is meant for, compared with the live delta
    of each module on random inputs in float64. A module that would not be applied, or a relative difference
    above 1e-6, is a ModelError, no room is a DiskFull; either way the file before keeps its name.
    metadata: free strings (modelspec.title, ...); of a value that is a local path the last part is written.
    """
    modules = adapted(transformer)
    if not modules:
        raise ModelError(f"nothing to save to {path}: the network has no adapter")
    factors = {name: module.factors() for name, module in modules.items()}
    live = {
        name: Delta(tuple(_live_terms(module)), factors[name].magnitude) for name, module in modules.items()
    }
    return _write(path, factors, live, layout, torch.float32, metadata or {})


def write(
    factors: Mapping[str, Factors], path: Path, layout: str, dtype: torch.dtype, metadata: Mapping[str, str]
) -> FileSummary:
    """The same for factors that belong to no network."""
    deltas = {name: Delta(((one.down, one.up),), one.magnitude) for name, one in factors.items()}
    return _write(path, factors, deltas, layout, dtype, metadata)


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
    path: Path,
    factors: Mapping[str, Factors],
    deltas: Mapping[str, Delta],
    layout: str,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> FileSummary:
    header = {"format": "pt", **{key: _without_path(value) for key, value in metadata.items()}}
    if layouts.HEADER_CONFIG in header:
        raise ModelError(f"{layouts.HEADER_CONFIG} must not be in the header: loaders disagree about it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(_tensors(factors, layout, dtype), temporary, metadata=header)
        sync(temporary)
        written = _verify(temporary, deltas, layout, TOLERANCE[dtype])
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:  # a full disk is the latter inside save_file
        raise DiskFull(f"{path} could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return written.opened()[1]


def _tensors(factors: Mapping[str, Factors], layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """alpha is folded into B; programs that ask for an alpha get the rank, which changes nothing."""
    to, tensors = LAYOUTS[layout], {}
    for name, one in (layouts.fused(factors) if to.native else factors).items():
        key = to.key(name)
        tensors[key + to.down] = one.down.to(dtype, copy=True).contiguous()
        tensors[key + to.up] = one.up.to(dtype, copy=True).contiguous()
        if to.native:
            tensors[key + layouts.ALPHA] = torch.tensor(float(one.rank))
        if one.magnitude is not None:
            tensors[key + layouts.MAGNITUDE] = one.magnitude.contiguous()
    return tensors


def _verify(temporary: Path, deltas: Mapping[str, Delta], layout: str, tolerance: float) -> LoraFile:
    try:
        file = layouts.read(temporary)
    except ModelError as error:
        raise ModelError(f"the saved LoRA would not be read: {error}") from error
    dora = any(delta.magnitude is not None for delta in deltas.values())
    for name in ("diffusers",) if dora else MEANT_FOR[layout]:
        program = loaders.PROGRAMS[name]
        if refusal := loaders.reading(program, file).refusal:
            raise ModelError(f"the saved LoRA would be refused by {program.title}: {refusal}")
        _compare(program.title, loaders.applied(program, file), deltas, tolerance, LAYOUTS[layout].native)
    return file


@torch.no_grad()
def _compare(
    program: str, found: Mapping[str, Factors], deltas: Mapping[str, Delta], tolerance: float, native: bool
) -> None:
    """native: rows of zeros may stand for a module that is not adapted, and the other way round."""
    unmatched = sorted(set(found) ^ set(deltas))
    if native:
        zero = {name for name in unmatched if not _up_of(name, found, deltas).any()}
        unmatched = [name for name in unmatched if name not in zero]
    if unmatched:
        more = f"{unmatched[0]} ({len(unmatched)} in all)"
        raise ModelError(f"the saved LoRA would not be applied to {more} by {program}")
    for name in set(found) & set(deltas):
        error = _relative_error(deltas[name], found[name])
        if not error <= tolerance:
            what = f"{name} in {program}: relative difference {error:.1e}"
            raise ModelError(f"the saved LoRA would act differently on {what}")


def _up_of(name: str, found: Mapping[str, Factors], deltas: Mapping[str, Delta]) -> Tensor:
    return found[name].up if name in found else torch.cat([up for _, up in deltas[name].terms], dim=1)


def _relative_error(delta: Delta, applied: Factors) -> float:
    """Largest difference of delta W p over random p, relative to the delta's larger terms; inf for NaN.

    Products with a few vectors see every difference that the full matrices would, at 1/1000 of the cost.
    """
    down, up = delta.terms[0]
    if applied.down.shape[1] != down.shape[1] or applied.up.shape[0] != up.shape[0]:
        return float("inf")
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(down.shape[1], PROBES, generator=generator, dtype=torch.float64)
    # On the CPU: MPS has no float64.
    wide = [(down.to("cpu").double(), up.to("cpu").double()) for down, up in delta.terms]
    products = [up @ (down @ probes) for down, up in wide]
    scale = max(float(product.abs().max()) for product in products)
    theirs = applied.up.double() @ (applied.down.double() @ probes)
    error = float((theirs - sum(products)).abs().max())
    if delta.magnitude is not None:
        same = applied.magnitude is not None and torch.equal(applied.magnitude, delta.magnitude.flatten())
        error = error if same else float("inf")
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0 else float("inf")


def _live_terms(module: AdaptedLinear) -> Iterator[tuple[Tensor, Tensor]]:
    """From the module's own parameters, not from what is about to be written."""
    yield module.down.detach(), module.up.detach() * module.scale
    if isinstance(module, LoraLinear) and module.start_down is not None and module.start_up is not None:
        yield module.start_down, module.start_up * -module.scale


def _without_path(value: str) -> str:
    local = re.match(r"([~/\\]|\.\.?[/\\]|[A-Za-z]:[/\\])", value)
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if local else value
