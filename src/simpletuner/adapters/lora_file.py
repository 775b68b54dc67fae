"""LoRA files of every layout, read into one form: diffusers' module -> its delta."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from simpletuner.adapters import safetensors_reader
from simpletuner.adapters.deltas import (
    LYCORIS_FACTOR_NAMES,
    Delta,
    LowRankDelta,
    LycorisDelta,
    invalid_factors_reason,
)
from simpletuner.adapters.layouts import (
    ALPHA_SUFFIX,
    DORA_SCALE_SUFFIX,
    LAYOUTS,
    MAGNITUDE_SUFFIX,
    PEFT_CONFIG_KEY,
    detect_layout,
)
from simpletuner.adapters.module_names import ModuleNames
from simpletuner.errors import ModelError


@dataclass(frozen=True)
class LoraFileSummary:
    """Content of a LoRA file, in diffusers' modules. ranks, alphas: each value once, ascending.

    layout: title of the layout. kind: LoRA, DoRA, LoHa or LoKr; a LoKr of rank 0 has an
    undecomposed second factor. parameters: number of values in the file.
    """

    layout: str
    kind: str
    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    parameters: int
    metadata: dict[str, str]

    def __str__(self) -> str:
        """Return, for example, "kohya layout, rank 16, alpha 8, 190 modules: attn.to_k"."""
        endings = sorted({re.sub(r"^.*blocks\.\d+\.", "", name) for name in self.modules})
        ranks, alphas = (
            "/".join(f"{value:g}" for value in values) for values in (self.ranks, self.alphas)
        )
        kind = "rank" if self.kind == "LoRA" else self.kind
        count = f"{len(self.modules)} module{'' if len(self.modules) == 1 else 's'}"
        return (
            f"{self.layout} layout, {kind} {ranks}, alpha {alphas}, {count}: {', '.join(endings)}"
        )


@dataclass(frozen=True)
class StoredModule:
    """One module as the file stores it. magnitude: PEFT's; dora_scale: LyCORIS'.

    Both are (out,), or (1, in) per input, as in LowRankDelta.
    """

    delta: Delta
    alpha: float | None = None
    magnitude: Tensor | None = None
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the delta."""
        return self.delta.rank

    @property
    def scale(self) -> float | None:
        """Alpha / rank, or None without an alpha; a LoKr of rank 0 is never scaled."""
        if self.rank == 0:
            return 1.0
        return None if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file. modules: by their names in the layout. peft_config: mostly empty."""

    path: Path
    layout: str
    names: ModuleNames
    modules: dict[str, StoredModule]
    peft_config: dict[str, Any]
    metadata: dict[str, str]
    parameters: int

    @property
    def is_lycoris(self) -> bool:
        """True for LoHa and LoKr."""
        return any(isinstance(module.delta, LycorisDelta) for module in self.modules.values())

    @property
    def uses_native_names(self) -> bool:
        """True if the modules have native names, else diffusers'."""
        return LAYOUTS[self.layout].uses_native_names

    def to_deltas(self) -> dict[str, Delta]:
        """Return diffusers' module -> delta, as the file was trained."""
        deltas: dict[str, Delta] = {}
        for name, module in self.modules.items():
            magnitude = module.magnitude
            if module.dora_scale is not None:
                magnitude = module.dora_scale
            deltas |= self.split_module(name, self.module_scale(name), magnitude)
        kinds = sorted({delta.kind for delta in deltas.values()})
        if len(kinds) != 1 and kinds != ["LoHa", "LoKr"]:
            problem = f"mixes {' and '.join(kinds)} modules" if deltas else "holds no LoRA weights"
            raise ModelError(f"{self.path} {problem}")
        return dict(sorted(deltas.items()))

    def to_deltas_and_summary(self) -> tuple[dict[str, Delta], LoraFileSummary]:
        """Return the deltas and the summary of the file."""
        deltas = self.to_deltas()
        alphas = {
            round(self.module_scale(name) * module.rank, 6) for name, module in self.modules.items()
        }
        summary = LoraFileSummary(
            layout=LAYOUTS[self.layout].title,
            kind=" and ".join(sorted({delta.kind for delta in deltas.values()})),
            modules=tuple(deltas),
            ranks=tuple(sorted({delta.rank for delta in deltas.values()})),
            alphas=tuple(sorted(alphas)),
            parameters=self.parameters,
            metadata=self.metadata,
        )
        return deltas, summary

    def module_scale(self, name: str) -> float:
        """Return alpha / rank from the alpha tensor, else from the header, else 1.

        Raises ModelError when alpha tensor and header disagree.
        """
        own = self.modules[name].scale
        header = self.peft_config_scale(name)
        if own is not None and header is not None and not math.isclose(own, header, rel_tol=1e-6):
            raise ModelError(f"{self.path}: {name} has an alpha that differs from the header's")
        return own if own is not None else 1.0 if header is None else header

    def peft_config_scale(self, name: str) -> float | None:
        """Return the scale by PEFT's configuration in the header; None without one."""
        rank = self.modules[name].rank
        config = self.peft_config
        if "lora_alpha" not in config or self.is_lycoris:
            return None
        patterns = config.get("alpha_pattern") or {}
        # PEFT treats them as regular expressions, but expressions from an untrusted file are never
        # executed: only plain names are supported.
        literal = {
            re.sub(r"[\^$\\]", "", str(pattern)): alpha for pattern, alpha in dict(patterns).items()
        }
        own_alphas = (
            alpha
            for pattern, alpha in literal.items()
            if name == pattern or name.endswith(f".{pattern}")
        )
        alpha = next(own_alphas, config["lora_alpha"])
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ModelError(f"{self.path}: lora_alpha in the header is not a number")
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)

    def split_module(
        self, name: str, scale: float, magnitude: Tensor | None = None
    ) -> dict[str, Delta]:
        """Split one stored module into diffusers' modules.

        A LoRA's parts share A and take rows of B; a LyCORIS product is restricted to rows. The
        parts of a block-diagonal pair get their own columns back. Exact; raises ModelError for
        impossible sizes.
        """
        fused = self.modules[name].delta.scaled(scale)
        per_input = magnitude is not None and magnitude.ndim == 2
        parts: tuple[str, ...] = (name,)
        slices = [slice(0, fused.shape[0])]
        if self.uses_native_names:
            parts = self.names.diffusers_names(name)
            try:
                slices = self.names.fused_row_slices(name, *fused.shape)
            except ValueError as error:
                raise ModelError(
                    f"{self.path}: {name}: {error}; it was trained on another model"
                ) from None
        if per_input and len(parts) > 1:
            raise ModelError(
                f"{self.path}: the magnitudes of {name} are norms of the columns of a fused matrix,"
                " which cannot be split into its parts"
            )
        deltas: dict[str, Delta] = {}
        for part, rows in zip(parts, slices):
            if isinstance(fused, LycorisDelta):
                deltas[part] = LycorisDelta(fused.factors, fused.scale, rows)
                continue
            used_columns = fused.up[rows].any(dim=0)
            if len(parts) > 1 and not used_columns.any() and fused.up.any():
                continue  # a module that the file does not adapt
            keep_all = len(parts) == 1 or bool(used_columns.all()) or not used_columns.any()
            columns = slice(None) if keep_all else used_columns
            row_norms = magnitude if magnitude is None or per_input else magnitude[rows]
            deltas[part] = LowRankDelta(fused.down[columns], fused.up[rows][:, columns], row_norms)
        return deltas


def read_lora_file(path: Path, names: ModuleNames) -> LoraFile:
    """Read a LoRA file of any layout, or a folder that holds one.

    Raises ModelError with the kind of file for anything else.
    """
    path = safetensors_reader.find_weights_file(path)
    keys, metadata = safetensors_reader.read_keys_and_metadata(path)
    layout = detect_layout(path, keys, names)
    peft_config = _parse_peft_config(path, metadata)
    tensors_by_module: dict[str, dict[str, Tensor]] = {}
    tensors = safetensors_reader.read_tensors(path)
    for key, tensor in tensors.items():
        name, suffix = LAYOUTS[layout].parse_key(key, names) or ("", "")
        tensors_by_module.setdefault(name, {})[suffix] = tensor
    modules = {
        name: _build_stored_module(path, layout, name, module_tensors)
        for name, module_tensors in sorted(tensors_by_module.items())
    }
    count = sum(tensor.numel() for tensor in tensors.values())
    return LoraFile(path, layout, names, modules, peft_config, metadata, count)


def _parse_peft_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        fields = json.loads(metadata.get(PEFT_CONFIG_KEY, "{}"))
        config = {key.removeprefix("transformer."): value for key, value in fields.items()}
        dict(config.get("alpha_pattern") or {})
        return config
    except (TypeError, ValueError, AttributeError, RecursionError):
        raise ModelError(f"{path}: {PEFT_CONFIG_KEY} in its header is not a JSON object") from None


def _build_stored_module(
    path: Path, layout: str, name: str, tensors: Mapping[str, Tensor]
) -> StoredModule:
    alpha = tensors.get(ALPHA_SUFFIX)
    factors = {
        factor: tensors[f".{factor}"] for factor in LYCORIS_FACTOR_NAMES if f".{factor}" in tensors
    }
    delta: Delta
    if factors:
        delta = _build_lycoris_delta(path, LAYOUTS[layout].key_for(name), factors, tensors)
    else:
        delta = _build_low_rank_delta(path, layout, name, tensors)
    if alpha is not None and (alpha.numel() != 1 or not bool(alpha.isfinite().all())):
        raise ModelError(f"{path}: the alpha of {name} is not a finite number")
    for suffix in (MAGNITUDE_SUFFIX, DORA_SCALE_SUFFIX):
        if suffix in tensors and (tensors[suffix].ndim == 0 or not tensors[suffix].numel()):
            raise ModelError(f"{path}: the magnitude of {name} has no rows")
    norms = [
        None if suffix not in tensors else _normalize_magnitude(path, name, tensors[suffix], delta)
        for suffix in (MAGNITUDE_SUFFIX, DORA_SCALE_SUFFIX)
    ]
    return StoredModule(delta, None if alpha is None else float(alpha), *norms)


def _normalize_magnitude(path: Path, name: str, magnitude: Tensor, delta: Delta) -> Tensor:
    """Return norms of rows as (out,), or norms of columns as (1, in)."""
    rows, columns = delta.shape
    if magnitude.ndim == 2 and magnitude.shape == (1, columns):
        return magnitude
    if magnitude.numel() == rows and magnitude.shape[0] == rows:
        return magnitude.flatten()
    raise ModelError(
        f"{path}: the magnitude of {name} has the shape {tuple(magnitude.shape)}, not ({rows},) or"
        f" (1, {columns})"
    )


def _build_lycoris_delta(
    path: Path, key: str, factors: dict[str, Tensor], tensors: Mapping[str, Tensor]
) -> LycorisDelta:
    unexpected = next(
        (suffix for suffix in tensors if suffix != ALPHA_SUFFIX and suffix[1:] not in factors), ""
    )
    reason = (
        f"{unexpected[1:]} belongs to a kind of LoHa or LoKr that is not supported"
        if unexpected
        else invalid_factors_reason(factors)
    )
    if reason:
        raise ModelError(f"{path}: {key}: {reason}")
    return LycorisDelta(factors)


def _build_low_rank_delta(
    path: Path, layout: str, name: str, tensors: Mapping[str, Tensor]
) -> LowRankDelta:
    suffixes = LAYOUTS[layout].suffixes
    for suffix in suffixes:
        if suffix not in tensors:
            raise ModelError(f"{path}: {LAYOUTS[layout].key_for(name)} has no {suffix[1:]}")
    down, up = (tensors[suffix] for suffix in suffixes)
    if (
        down.ndim != 2
        or up.ndim != 2
        or down.shape[0] != up.shape[1]
        or 0 in (*down.shape, *up.shape)
    ):
        raise ModelError(
            f"{path}: {name}: shapes {tuple(down.shape)} and {tuple(up.shape)} are not a LoRA pair"
        )
    return LowRankDelta(down, up)
