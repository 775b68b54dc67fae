"""Writing a LoRA that other programs load at its right strength, and proof of it before it gets its name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.adapters import layout
from simpletuner.adapters.layout import Factors, FileSummary
from simpletuner.adapters.linear import AdaptedLinear, LoraLinear, adapted
from simpletuner.adapters.lora import attach_file
from simpletuner.errors import DiskFull, ModelError

TOLERANCE = 1e-6
PROBES = 8


def save(transformer: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> FileSummary:
    """Write the adapter to `path` (its folder exists): temporary name, fsync, read back, rename.

    Read back means: as diffusers names and scales modules, compared with the live delta of each module
    on random inputs in float64. A key that would match nothing, or a relative difference above 1e-6, is
    a ModelError, no room is a DiskFull; either way the file before keeps its name. metadata: free strings
    (modelspec.title, ...); of a value that is a local path only the last part is written.
    """
    modules = adapted(transformer)
    if not modules:
        raise ModelError(f"nothing to save to {path}: the network has no adapter")
    header = {"format": "pt", **{key: _without_path(value) for key, value in (metadata or {}).items()}}
    if layout.HEADER_CONFIG in header:
        raise ModelError(f"{layout.HEADER_CONFIG} must not be in the header: loaders disagree about it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(_tensors(modules), temporary, metadata=header)
        _sync(temporary)
        _verify(temporary, modules)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:  # a full disk is the latter inside save_file
        raise DiskFull(f"{path} could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return describe(path)


def load_into(transformer: nn.Module, path: Path, strength: float = 1.0) -> FileSummary:
    """Adapt a network by a file (or a folder that holds one) with its modules and ranks, frozen.

    Refuses other layouts by name, a network with an adapter, modules it lacks, other sizes (ModelError).
    """
    return attach_file(transformer, path, strength)


def describe(path: Path) -> FileSummary:
    """What a file holds, without a network."""
    return layout.read(path)[1]


def _tensors(modules: Mapping[str, AdaptedLinear]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        factors = module.factors()
        tensors[f"{layout.PREFIX}{name}{layout.DOWN}"] = factors.down.contiguous()
        tensors[f"{layout.PREFIX}{name}{layout.UP}"] = factors.up.contiguous()
        if factors.magnitude is not None:
            tensors[f"{layout.PREFIX}{name}{layout.MAGNITUDE}"] = factors.magnitude.contiguous()
    return tensors


def _verify(file: Path, modules: Mapping[str, AdaptedLinear]) -> None:
    applied = _as_diffusers_applies(layout.tensors_of(file)[0])
    unmatched = sorted(set(applied) ^ set(modules))
    if unmatched:
        raise ModelError(f"the saved LoRA would not be applied to {unmatched[0]} ({len(unmatched)} in all)")
    for name, module in modules.items():
        error = _relative_error(module, applied[name])
        if not error <= TOLERANCE:
            raise ModelError(
                f"the saved LoRA would act differently on {name}: relative difference {error:.1e}"
            )


def _as_diffusers_applies(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """What `load_lora_weights` makes of a file, from its documented rules and not from our own names.

    Keys without the prefix are dropped in silence. The module is all before ".lora"; the rank is the
    second size of lora_B; alpha is the ".alpha" tensor, else the rank.
    """
    kept = {
        key[len("transformer.") :]: value for key, value in tensors.items() if key.startswith("transformer.")
    }
    applied: dict[str, Factors] = {}
    for name in {key.split(".lora")[0] for key in kept if ".lora" in key}:
        up, down = kept.get(f"{name}.lora_B.weight"), kept.get(f"{name}.lora_A.weight")
        if up is None or down is None:
            continue
        rank = up.shape[1]
        scale = float(kept.get(f"{name}.alpha", rank)) / rank
        magnitude = kept.get(f"{name}.lora_magnitude_vector")
        applied[name] = Factors(down, up if scale == 1.0 else up * scale, magnitude)
    return applied


@torch.no_grad()
def _relative_error(module: AdaptedLinear, applied: Factors) -> float:
    """Largest difference of delta W p over random p, relative to the delta's larger terms; inf for NaN.

    Products with a few vectors see every difference that the full matrices would, at 1/1000 of the cost.
    """
    live = module.factors()
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(live.down.shape[1], PROBES, generator=generator, dtype=torch.float64)
    if applied.down.shape[1] != live.down.shape[1] or applied.up.shape[0] != live.up.shape[0]:
        return float("inf")
    ours, scale = _live_product(module, probes)
    theirs = applied.up.double() @ (applied.down.double() @ probes)
    error = float((theirs - ours).abs().max())
    if live.magnitude is not None:
        same = applied.magnitude is not None and torch.equal(applied.magnitude.float(), live.magnitude)
        error = error if same else float("inf")
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0 else float("inf")


def _live_product(module: AdaptedLinear, probes: Tensor) -> tuple[Tensor, float]:
    """delta W p from the module's own parameters, and the size of its larger term."""
    terms: list[tuple[Tensor, Tensor]] = [(module.down, module.up)]
    if isinstance(module, LoraLinear) and module.start_down is not None and module.start_up is not None:
        terms.append((module.start_down, module.start_up))
    # On the CPU: MPS has no float64.
    wide = [(down.to("cpu").double(), up.to("cpu").double()) for down, up in terms]
    products = [module.scale * (up @ (down @ probes)) for down, up in wide]
    total = products[0] - products[1] if len(products) == 2 else products[0]
    return total, max(float(product.abs().max()) for product in products)


def _without_path(value: str) -> str:
    local = re.match(r"([~/\\]|\.\.?[/\\]|[A-Za-z]:[/\\])", value)
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if local else value


def _sync(path: Path) -> None:
    """A directory too: the rename itself must survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
