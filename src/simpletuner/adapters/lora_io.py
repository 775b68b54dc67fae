"""Write LoRAs that other programs load at the right strength, verified before the final rename."""

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
from simpletuner.adapters.adapted_linear import AdaptedLinear, LowRankLinear, adapted_modules
from simpletuner.adapters.attachment import attach_adapter_from_file
from simpletuner.adapters.compatibility import LoraConventions
from simpletuner.adapters.deltas import Delta, LowRankDelta, LycorisDelta
from simpletuner.adapters.fused_modules import fuse_modules
from simpletuner.adapters.layouts import LAYOUTS
from simpletuner.adapters.lora_file import LoraFile, LoraFileSummary, read_lora_file
from simpletuner.adapters.module_names import ModuleNames
from simpletuner.atomic_io import fsync_path, os_error_of
from simpletuner.errors import ModelError, storage_error

PROBE_VECTORS = 8
# Largest rounding error of a dtype, relative to the larger terms of a delta.
TOLERANCES = MappingProxyType({torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2})

# Layouts that hold a LoHa or LoKr; the native ones hold fused matrices as LoHa.
LYCORIS_LAYOUTS = ("lycoris", "kohya", "comfyui")
ExpectedDeltas = Mapping[str, Delta | AdaptedLinear]  # a saved file is compared with them


def save_adapter(
    transformer: nn.Module,
    path: Path,
    conventions: LoraConventions,
    metadata: Mapping[str, str] | None = None,
    layout: str | None = None,
) -> LoraFileSummary:
    """Write the adapter to `path`: to a temporary file, synced, verified, then renamed.

    Verification reads the file by the rules of each program that the layout is meant for, and
    compares it with the live delta of each module on random inputs in float64. Raises ModelError
    when a module would not be applied or differs by more than 1e-6, DiskFull when there is no
    space; in both cases an existing file is unchanged. The folder must exist.

    layout: None means "lycoris" for LoHa and LoKr, else "diffusers". metadata: free strings
    (modelspec.title, ...); of a value that is a local path only the last part is written.
    """
    modules = adapted_modules(transformer)
    if not modules:
        raise ModelError(f"cannot save {path}: the network does not have an adapter")
    deltas = {name: module.to_delta() for name, module in modules.items()}
    is_lycoris = any(isinstance(delta, LycorisDelta) for delta in deltas.values())
    layout = layout or default_layout("LoKr" if is_lycoris else "LoRA")
    return _save_verified(path, deltas, modules, conventions, layout, torch.float32, metadata or {})


def save_deltas(
    deltas: Mapping[str, Delta],
    path: Path,
    conventions: LoraConventions,
    layout: str,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> LoraFileSummary:
    """Write deltas that do not belong to a network, in the same verified way."""
    return _save_verified(path, deltas, deltas, conventions, layout, dtype, metadata)


def default_layout(kind: str) -> str:
    """Return the layout of the default file of an adapter: LoRA, DoRA, LoHa or LoKr."""
    return "diffusers" if kind in ("LoRA", "DoRA") else "lycoris"


def path_with_layout(path: Path, layout: str) -> Path:
    """Return the path with the layout in its name: name.safetensors -> name.kohya.safetensors."""
    return path.with_name(f"{path.stem}.{layout}{path.suffix}")


def load_adapter(
    transformer: nn.Module, path: Path, names: ModuleNames, strength: float = 1.0
) -> LoraFileSummary:
    """Adapt a network by a LoRA file, or a folder that holds one, and freeze it.

    Raises ModelError for a network that already has an adapter, lacks a module or has other sizes.
    """
    return attach_adapter_from_file(transformer, path, names, strength)


def read_summary(path: Path, names: ModuleNames) -> LoraFileSummary:
    """Return the summary of a LoRA file."""
    return read_lora_file(path, names).to_deltas_and_summary()[1]


def _save_verified(
    path: Path,
    deltas: Mapping[str, Delta],
    expected: ExpectedDeltas,
    conventions: LoraConventions,
    layout: str,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> LoraFileSummary:
    header = {"format": "pt", **{key: _strip_local_path(value) for key, value in metadata.items()}}
    if layouts.PEFT_CONFIG_KEY in header:
        raise ModelError(
            f"{layouts.PEFT_CONFIG_KEY} must not be in the header, because programs read it"
            " differently"
        )
    # The file gets its name only after it was read back as each program reads it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tensors = _delta_tensors(deltas, conventions.names, layout, dtype)
        save_file(tensors, temporary, metadata=header)
        fsync_path(temporary)
        written = _verify_file(temporary, expected, conventions, layout, TOLERANCES[dtype])
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise storage_error(f"{path} cannot be written", error) from error
    except SafetensorError as error:  # so save_file reports a full disk
        raise storage_error(f"{path} cannot be written", os_error_of(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return written.to_deltas_and_summary()[1]


def _delta_tensors(
    deltas: Mapping[str, Delta], names: ModuleNames, layout: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors of a file. Alpha is folded into B; layouts with alpha get the rank.

    An alpha equal to the rank is a scale of 1.
    """
    target = LAYOUTS[layout]
    tensors: dict[str, Tensor] = {}
    stored = fuse_modules(deltas, names) if target.uses_native_names else deltas
    for name, delta in stored.items():
        key = target.key_for(name)
        if isinstance(delta, LycorisDelta):
            tensors |= _lycoris_tensors(key, delta, layout, dtype)
            continue
        tensors[key + target.down_suffix] = delta.down.to(dtype, copy=True).contiguous()
        tensors[key + target.up_suffix] = delta.up.to(dtype, copy=True).contiguous()
        if target.suffixes != LAYOUTS["diffusers"].suffixes:
            tensors[key + layouts.ALPHA_SUFFIX] = torch.tensor(float(delta.rank))
        if delta.magnitude is not None:
            suffix = layouts.MAGNITUDE_SUFFIX
            if delta.magnitude.ndim == 2:  # per input: only ComfyUI applies it, under this name
                suffix = layouts.DORA_SCALE_SUFFIX
            tensors[key + suffix] = delta.magnitude.contiguous()
    return tensors


def _lycoris_tensors(
    key: str, delta: LycorisDelta, layout: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a product's tensors as LyCORIS writes them.

    alpha is 1 when the rank is 0, where it has no effect.
    """
    if layout not in LYCORIS_LAYOUTS or delta.shape[0] < delta.total_rows:
        reason = (
            f"the {LAYOUTS[layout].title} layout cannot hold a {delta.kind} exactly"
            if layout not in LYCORIS_LAYOUTS
            else f"rows of a fused matrix cannot be written as a {delta.kind} exactly"
        )
        raise ModelError(
            f"{reason}; simpletuner export --rank N writes a LoRA that approximates it"
        )
    factors = {
        f"{key}.{name}": factor.to(dtype, copy=True).contiguous()
        for name, factor in delta.factors.items()
    }
    return {
        **factors,
        key + layouts.ALPHA_SUFFIX: torch.tensor(delta.scale * delta.rank if delta.rank else 1.0),
    }


def _verify_file(
    temporary: Path,
    expected: ExpectedDeltas,
    conventions: LoraConventions,
    layout: str,
    tolerance: float,
) -> LoraFile:
    try:
        file = read_lora_file(temporary, conventions.names)
    except ModelError as error:
        raise ModelError(f"the saved LoRA cannot be read back: {error}") from error
    magnitudes = [delta.magnitude for delta in expected.values() if delta.magnitude is not None]
    verified = conventions.verified_programs[layout]
    if file.is_lycoris:
        verified = tuple(name for name in verified if name in conventions.lycoris_programs)
    if magnitudes:
        verified = ("diffusers",) if magnitudes[0].ndim == 1 else ("comfyui",)
    for name in verified:
        program = conventions.programs[name]
        if refusal := compatibility.predict_load(program, file).refusal:
            raise ModelError(f"the saved LoRA would be refused by {program.title}: {refusal}")
        _compare_deltas(
            program.title,
            compatibility.applied_deltas(program, file),
            expected,
            tolerance,
            LAYOUTS[layout].uses_native_names,
        )
    return file


@torch.no_grad()
def _compare_deltas(
    program: str,
    applied: Mapping[str, Delta],
    expected: ExpectedDeltas,
    tolerance: float,
    native: bool,
) -> None:
    """Compare applied with expected deltas, module by module.

    native: a module that is not adapted may be stored as rows of zeros, and the reverse.
    """
    unmatched = sorted(set(applied) ^ set(expected))
    if native:
        deltas = {**expected, **applied}
        unmatched = [
            name for name in unmatched if any(term.any() for term in _probe_outputs(deltas[name]))
        ]
    if unmatched:
        examples = f"{unmatched[0]} ({len(unmatched)} in all)"
        raise ModelError(f"the saved LoRA would not be applied to {examples} by {program}")
    for name in set(applied) & set(expected):
        error = _relative_error(expected[name], applied[name])
        # Not `error > tolerance`, which a NaN would pass.
        if not error <= tolerance:
            raise ModelError(
                f"the saved LoRA would be applied differently to {name} by {program}: relative"
                f" difference {error:.1e}"
            )


def _relative_error(expected: Delta | AdaptedLinear, applied: Delta) -> float:
    """Return the largest difference of delta W p over random p; inf for NaN.

    It is relative to the larger terms of the delta. Products with a few random vectors reveal every
    difference that the full matrices would, at 1/1000 of the cost.
    """
    if expected.shape != applied.shape:
        return float("inf")
    terms, applied_terms = _probe_outputs(expected), _probe_outputs(applied)
    scale = max(float(term.abs().max()) for term in terms)
    error = float(torch.stack([*applied_terms, *(-term for term in terms)]).sum(0).abs().max())
    if expected.magnitude is not None:
        norms = expected.magnitude.cpu()
        equal = applied.magnitude is not None and torch.equal(applied.magnitude, norms)
        # Norms are stored as they are, so any difference is an error.
        error = error if equal else float("inf")
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0 else float("inf")


def _probe_outputs(delta: Delta | AdaptedLinear) -> list[Tensor]:
    """Return the terms of delta W p for a few random p.

    Two for LoHa and LoKr: the fused LoHa of a block costs 50 times as much as a LoRA.
    """
    # The same probes for both sides, so that equal deltas give equal outputs.
    generator = torch.Generator().manual_seed(0)
    count = PROBE_VECTORS if isinstance(delta, (LowRankDelta, LowRankLinear)) else 2
    return delta.output_terms(
        torch.randn(delta.shape[1], count, generator=generator, dtype=torch.float64)
    )


def _strip_local_path(value: str) -> str:
    is_local = re.match(r"([~/\\]|\.\.?[/\\]|[A-Za-z]:[/\\])", value)
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_local else value
