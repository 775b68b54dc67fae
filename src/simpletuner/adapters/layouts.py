"""LoRA files in every layout in use, read into one form: diffusers module -> its delta."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from simpletuner.adapters import module_names, safetensors_reader
from simpletuner.adapters.deltas import (
    LYCORIS_FACTOR_NAMES,
    Delta,
    LowRankDelta,
    LycorisDelta,
    invalid_factors_reason,
)
from simpletuner.errors import ModelError

# PEFT's configuration in a file's header: diffusers takes strengths from it, ComfyUI does not see it.
PEFT_CONFIG_KEY = "lora_adapter_metadata"
DOWN_SUFFIX, UP_SUFFIX, MAGNITUDE_SUFFIX, ALPHA_SUFFIX = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_magnitude_vector",
    ".alpha",
)
DORA_SCALE_SUFFIX = ".dora_scale"  # LyCORIS' name of the magnitude, (out, 1)


@dataclass(frozen=True)
class LoraFileSummary:
    """What a LoRA file holds, in diffusers' modules. ranks, alphas: each that occurs, ascending.

    layout: what people call it. kind: LoRA, DoRA, LoHa or LoKr; LoKr's rank 0 is a whole second matrix.
    parameters: numbers in the file.
    """

    layout: str
    kind: str
    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    parameters: int
    metadata: dict[str, str]

    def __str__(self) -> str:
        """Kohya layout, rank 16, alpha 8, 190 modules: attn.to_k, attn.to_q"""
        ends = sorted({re.sub(r"^.*blocks\.\d+\.", "", name) for name in self.modules})
        ranks, alphas = ("/".join(f"{one:g}" for one in many) for many in (self.ranks, self.alphas))
        kind = "rank" if self.kind == "LoRA" else self.kind
        return (
            f"{self.layout} layout, {kind} {ranks}, alpha {alphas}, {len(self.modules)} modules:"
            f" {', '.join(ends)}"
        )


@dataclass(frozen=True)
class Layout:
    """A key is prefix + module + ending. title: what people call it. flat: dots of the module are `_`."""

    title: str
    prefix: str
    uses_native_names: bool
    underscored: bool = False
    suffixes: tuple[str, str] = (DOWN_SUFFIX, UP_SUFFIX)

    @property
    def down_suffix(self) -> str:
        return self.suffixes[0]

    @property
    def up_suffix(self) -> str:
        return self.suffixes[1]

    def key_for(self, module: str) -> str:
        return self.prefix + (
            module_names.dots_to_underscores(module) if self.underscored else module
        )

    def parse_module(self, written: str) -> str | None:
        """The middle of a key as a dotted name, native or diffusers'; None for what Chroma has not."""
        if self.underscored:
            return module_names.underscores_to_dots(written, self.uses_native_names)
        known = (
            module_names.diffusers_names(written)
            if self.uses_native_names
            else module_names.locate_in_native(written)
        )
        return written if known or self.prefix == "transformer." else None


# The twelve layouts that are met are these nine, the first with and without alpha tensors and header.
_KOHYA_SUFFIXES = (".lora_down.weight", ".lora_up.weight")
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "diffusers": Layout("diffusers", "transformer.", uses_native_names=False),
        "transformer-kohya": Layout(
            "transformer. with lora_down/up",
            "transformer.",
            uses_native_names=False,
            suffixes=_KOHYA_SUFFIXES,
        ),
        "kohya": Layout(
            "kohya",
            "lora_unet_",
            uses_native_names=True,
            underscored=True,
            suffixes=_KOHYA_SUFFIXES,
        ),
        "comfyui": Layout(
            "ComfyUI", "diffusion_model.", uses_native_names=True, suffixes=_KOHYA_SUFFIXES
        ),
        "comfyui-peft": Layout(
            "ComfyUI with lora_A/B (AI Toolkit)", "diffusion_model.", uses_native_names=True
        ),
        "comfyui-diffusers": Layout(
            "diffusers' names under diffusion_model.", "diffusion_model.", uses_native_names=False
        ),
        "onetrainer": Layout(
            "OneTrainer",
            "lora_transformer_",
            uses_native_names=False,
            underscored=True,
            suffixes=_KOHYA_SUFFIXES,
        ),
        "lycoris": Layout(
            "LyCORIS",
            "lycoris_",
            uses_native_names=False,
            underscored=True,
            suffixes=_KOHYA_SUFFIXES,
        ),
        "bare": Layout("diffusers' names without a prefix", "", uses_native_names=False),
    }
)

# Part of a key that no layout has -> what such a file is.
UNSUPPORTED_KEYS = {
    "lora_te": "has text encoder weights (lora_te*), which Chroma's T5 does not take",
    "text_encoder": "has text encoder weights, which Chroma's T5 does not take",
    ".lokr_t": "is a LoKr of convolutions, which Chroma has not",
    ".hada_t": "is a LoHa of convolutions, which Chroma has not",
    ".oft_": "is an OFT (oft_*), which is not read here",
    "distilled_guidance_layer": "adapts the approximator, which breaks the model",
    "mod_lin": "adapts modulation layers, which Flux has and Chroma has not",
    "mod.lin": "adapts modulation layers, which Flux has and Chroma has not",
    "modulation": "adapts modulation layers, which Flux has and Chroma has not",
    "base_model.model.": "is a PEFT adapter folder's (base_model.model.*), whose alpha is in another file",
}


@dataclass(frozen=True)
class StoredModule:
    """One module as the file has it, before any rule. magnitude: PEFT's; dora_scale: LyCORIS'."""

    delta: Delta
    alpha: float | None = None
    magnitude: Tensor | None = None
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.delta.rank

    @property
    def scale(self) -> float | None:
        """Alpha / rank; None where it is not said. Two whole matrices of a LoKr are never scaled."""
        if self.rank == 0:
            return 1.0
        return None if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class LoraFile:
    """modules: by their names in the layout. header: PEFT's configuration, mostly empty."""

    path: Path
    layout: str
    modules: dict[str, StoredModule]
    peft_config: dict[str, Any]
    metadata: dict[str, str]
    parameters: int

    @property
    def is_lycoris(self) -> bool:
        return any(isinstance(one.delta, LycorisDelta) for one in self.modules.values())

    def to_deltas(self) -> dict[str, Delta]:
        """What the file was made to do: diffusers module -> delta."""
        found: dict[str, Delta] = {}
        for name, one in self.modules.items():
            magnitude = one.magnitude
            if one.dora_scale is not None:
                rows = one.delta.shape[0]
                if one.dora_scale.shape[0] != rows or one.dora_scale.numel() != rows:
                    raise ModelError(
                        f"{self.path}: the dora_scale of {name} is per input, which is not read here"
                    )
                magnitude = one.dora_scale.flatten()
            found |= self.split_module(name, self.module_scale(name), magnitude)
        kinds = sorted({one.kind for one in found.values()})
        if len(kinds) != 1:
            what = f"mixes {' and '.join(kinds)} modules" if found else "holds no LoRA weights"
            raise ModelError(f"{self.path} {what}")
        return dict(sorted(found.items()))

    def to_deltas_and_summary(self) -> tuple[dict[str, Delta], LoraFileSummary]:
        deltas = self.to_deltas()
        alphas = {
            round(self.module_scale(name) * one.rank, 6) for name, one in self.modules.items()
        }
        summary = LoraFileSummary(
            layout=LAYOUTS[self.layout].title,
            kind=next(iter(deltas.values())).kind,
            modules=tuple(deltas),
            ranks=tuple(sorted({one.rank for one in deltas.values()})),
            alphas=tuple(sorted(alphas)),
            parameters=self.parameters,
            metadata=self.metadata,
        )
        return deltas, summary

    def module_scale(self, name: str) -> float:
        """Alpha / rank by the alpha tensor, else by the header, else 1. ModelError where the two differ."""
        own, told = self.modules[name].scale, self.peft_config_scale(name)
        if own is not None and told is not None and not math.isclose(own, told, rel_tol=1e-6):
            raise ModelError(
                f"{self.path}: {name} has an alpha of its own and another in the header"
            )
        return own if own is not None else 1.0 if told is None else told

    def peft_config_scale(self, name: str) -> float | None:
        """As PEFT reads its own configuration; None where it says nothing."""
        rank, config = self.modules[name].rank, self.peft_config
        if "lora_alpha" not in config or self.is_lycoris:
            return None
        patterns = config.get("alpha_pattern") or {}
        # Regular expressions by PEFT's rule, but a stranger's are never run: names alone are understood.
        literal = {
            re.sub(r"[\^$\\]", "", str(pattern)): alpha for pattern, alpha in dict(patterns).items()
        }
        own = (
            alpha
            for pattern, alpha in literal.items()
            if name == pattern or name.endswith(f".{pattern}")
        )
        alpha = next(own, config["lora_alpha"])
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ModelError(f"{self.path}: lora_alpha in the header is no number")
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)

    def split_module(
        self, name: str, scale: float, magnitude: Tensor | None = None
    ) -> dict[str, Delta]:
        """One stored module as diffusers' modules: the same A, rows of B, or rows of a product.

        Of a block-diagonal pair each part gets its own columns back. Exact; ModelError where sizes cannot be.
        """
        whole = self.modules[name].delta.scaled(scale)
        parts = (
            module_names.diffusers_names(name)
            if LAYOUTS[self.layout].uses_native_names
            else (name,)
        )
        try:
            rows = module_names.fused_row_slices(len(parts), *whole.shape)
        except ValueError as error:
            raise ModelError(
                f"{self.path}: {name}: {error}; it was made for another model"
            ) from None
        found: dict[str, Delta] = {}
        for part, where in zip(parts, rows):
            if isinstance(whole, LycorisDelta):
                found[part] = LycorisDelta(whole.factors, whole.scale, where)
                continue
            mine = whole.up[where].any(dim=0)
            if len(parts) > 1 and not mine.any() and whole.up.any():
                continue  # a module that the file does not adapt
            own = slice(None) if len(parts) == 1 or mine.all() or not mine.any() else mine
            length = None if magnitude is None else magnitude[where]
            found[part] = LowRankDelta(whole.down[own], whole.up[where][:, own], length)
        return found


def read_lora_file(path: Path) -> LoraFile:
    """A file, or a folder that holds one, of any layout. ModelError says what else it is."""
    path = safetensors_reader.find_weights_file(path)
    keys, metadata = safetensors_reader.read_keys_and_metadata(path)
    layout = _detect_layout(path, keys)
    header = _parse_peft_config(path, metadata)
    parts: dict[str, dict[str, Tensor]] = {}
    tensors = safetensors_reader.read_tensors(path)
    for key, tensor in tensors.items():
        name, ending = _parse_key(LAYOUTS[layout], key) or ("", "")
        parts.setdefault(name, {})[ending] = tensor
    modules = {
        name: _build_stored_module(path, layout, name, found)
        for name, found in sorted(parts.items())
    }
    count = sum(tensor.numel() for tensor in tensors.values())
    return LoraFile(path, layout, modules, header, metadata, count)


def fuse_qkv(factors: Mapping[str, Delta]) -> dict[str, LowRankDelta]:
    """Native module -> factors: one A for all parts where they share it, else block-diagonal; exact.

    A part that is not adapted gets rows of zeros. ModelError for all but LoRA, and for modules without native
    name.
    """
    groups: dict[str, dict[int, LowRankDelta]] = {}
    for name, one in factors.items():
        place = module_names.locate_in_native(name)
        if place is None:
            raise ModelError(f"{name} has no native name; only the diffusers layout can hold it")
        if isinstance(one, LycorisDelta) or one.magnitude is not None:
            raise ModelError(
                f"the native layouts cannot hold a {one.kind}: no program applies one in them as trained"
            )
        groups.setdefault(place[0], {})[place[1]] = one
    return {native: _fuse_module(native, parts) for native, parts in groups.items()}


def _fuse_module(native: str, parts: Mapping[int, LowRankDelta]) -> LowRankDelta:
    count = len(module_names.diffusers_names(native))
    if count == 1:
        return parts[0]
    first = next(iter(parts.values()))
    width = first.down.shape[1]
    heights = [width, width, width, module_names.MLP_RATIO * width][:count]
    shared = all(
        one.down.shape == first.down.shape and torch.equal(one.down, first.down)
        for one in parts.values()
    )
    rank = first.rank if shared else sum(one.rank for one in parts.values())
    up, row, column = torch.zeros(sum(heights), rank), 0, 0
    for place, height in enumerate(heights):
        if place in parts:
            part = parts[place].up
            if part.shape[0] != height:
                raise ModelError(f"{native}: part {place} has {part.shape[0]} rows, not {height}")
            up[row : row + height, column : column + part.shape[1]] = part
            column += 0 if shared else part.shape[1]
        row += height
    return LowRankDelta(
        first.down if shared else torch.cat([parts[place].down for place in sorted(parts)]), up
    )


def _parse_key(layout: Layout, key: str) -> tuple[str, str] | None:
    """(module, ending) of a key of this layout."""
    endings = (
        layout.down_suffix,
        layout.up_suffix,
        ALPHA_SUFFIX,
        MAGNITUDE_SUFFIX,
        DORA_SCALE_SUFFIX,
        *(f".{part}" for part in LYCORIS_FACTOR_NAMES),
    )
    ending = next((one for one in endings if key.endswith(one)), None)
    if ending is None or not key.startswith(layout.prefix):
        return None
    module = layout.parse_module(key[len(layout.prefix) : -len(ending)])
    return None if module is None else (module, ending)


def _detect_layout(path: Path, keys: Iterable[str]) -> str:
    """The one layout that every key is of."""
    keys = list(keys)
    if not keys:
        raise ModelError(f"{path} holds no LoRA weights")
    fitting = {
        name: sum(_parse_key(layout, key) is not None for key in keys)
        for name, layout in LAYOUTS.items()
    }
    best = max(fitting, key=lambda name: fitting[name])
    if fitting[best] == len(keys):
        return best
    if not any(re.search(r"lora|hada|lokr|oft_|alpha", key) for key in keys):
        raise ModelError(
            f"{path} holds whole weights, such as {min(keys)!r}: a model, no LoRA of Chroma"
        )
    for mark, what in UNSUPPORTED_KEYS.items():
        if any(mark in key for key in keys):
            raise ModelError(f"{path} {what}")
    odd = next(key for key in keys if _parse_key(LAYOUTS[best], key) is None)
    if fitting[best]:
        title = LAYOUTS[best].title
        raise ModelError(
            f"{path}: {fitting[best]} of {len(keys)} keys are of the layout {title}, {odd!r} is not"
        )
    raise ModelError(f"{path} is no LoRA of Chroma: key {odd!r} is not of any known layout")


def _parse_peft_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        fields = json.loads(metadata.get(PEFT_CONFIG_KEY, "{}"))
        config = {key.removeprefix("transformer."): value for key, value in fields.items()}
        dict(config.get("alpha_pattern") or {})
        return config
    except (TypeError, ValueError, AttributeError, RecursionError):
        raise ModelError(f"{path}: {PEFT_CONFIG_KEY} in its header is no JSON object") from None


def _build_stored_module(
    path: Path, layout: str, name: str, parts: Mapping[str, Tensor]
) -> StoredModule:
    ends = LAYOUTS[layout]
    alpha, magnitude = parts.get(ALPHA_SUFFIX), parts.get(MAGNITUDE_SUFFIX)
    delta: Delta
    if product := {part: parts[f".{part}"] for part in LYCORIS_FACTOR_NAMES if f".{part}" in parts}:
        odd = next((end for end in parts if end != ALPHA_SUFFIX and end[1:] not in product), "")
        if (
            why := f"{odd[1:]} belongs to no LoHa or LoKr that is read here"
            if odd
            else invalid_factors_reason(product)
        ):
            raise ModelError(f"{path}: {ends.key_for(name)}: {why}")
        delta = LycorisDelta(product)
    else:
        for needed in (ends.down_suffix, ends.up_suffix):
            if needed not in parts:
                raise ModelError(f"{path}: {ends.key_for(name)} has no {needed[1:]}")
        down, up = parts[ends.down_suffix], parts[ends.up_suffix]
        if (
            down.ndim != 2
            or up.ndim != 2
            or down.shape[0] != up.shape[1]
            or 0 in (*down.shape, *up.shape)
        ):
            shapes = f"shapes {tuple(down.shape)} and {tuple(up.shape)}"
            raise ModelError(f"{path}: {name}: {shapes} are no LoRA pair")
        delta = LowRankDelta(down, up)
    if alpha is not None and (alpha.numel() != 1 or not bool(alpha.isfinite().all())):
        raise ModelError(f"{path}: the alpha of {name} is no number")
    for ending in (MAGNITUDE_SUFFIX, DORA_SCALE_SUFFIX):
        if ending in parts and (parts[ending].ndim == 0 or not parts[ending].numel()):
            raise ModelError(f"{path}: the magnitude of {name} has no rows")
    if magnitude is not None and magnitude.numel() != delta.shape[0]:
        what = f"the magnitude of {name} has {magnitude.numel()} rows, not {delta.shape[0]}"
        raise ModelError(f"{path}: {what}")
    lengths = None if magnitude is None else magnitude.flatten()
    return StoredModule(
        delta, None if alpha is None else float(alpha), lengths, parts.get(DORA_SCALE_SUFFIX)
    )
