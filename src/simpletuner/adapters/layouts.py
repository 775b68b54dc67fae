"""Key layouts of LoRA files: how a module's name and a tensor's suffix form a key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from simpletuner.adapters.deltas import LYCORIS_FACTOR_NAMES
from simpletuner.adapters.module_names import ModuleNames, dots_to_underscores
from simpletuner.errors import ModelError

# PEFT's configuration in a file's header: diffusers reads alpha from it, ComfyUI ignores it.
PEFT_CONFIG_KEY = "lora_adapter_metadata"
DOWN_SUFFIX = ".lora_A.weight"
UP_SUFFIX = ".lora_B.weight"
MAGNITUDE_SUFFIX = ".lora_magnitude_vector"
ONETRAINER_MAGNITUDE_SUFFIX = ".lora_magnitude_vector.weight"
ALPHA_SUFFIX = ".alpha"
DORA_SCALE_SUFFIX = ".dora_scale"  # LyCORIS' name of the magnitude, (out, 1)


@dataclass(frozen=True)
class Layout:
    """A key is prefix + module + suffix. title: the name that people use for the layout.

    underscored: the dots of the module's name are written as underscores. suffixes: of A and B.
    numbered_parts: a native name is followed by the number of the part, "img_attn.qkv.0", where it
    has several; such modules are diffusers'.
    """

    title: str
    prefix: str
    uses_native_names: bool
    underscored: bool = False
    suffixes: tuple[str, str] = (DOWN_SUFFIX, UP_SUFFIX)
    numbered_parts: bool = False

    @property
    def down_suffix(self) -> str:
        """Suffix of A."""
        return self.suffixes[0]

    @property
    def up_suffix(self) -> str:
        """Suffix of B."""
        return self.suffixes[1]

    def key_for(self, module: str) -> str:
        """Return the key of a module without suffix."""
        return self.prefix + (dots_to_underscores(module) if self.underscored else module)

    def parse_module(self, written: str, names: ModuleNames) -> str | None:
        """Return the dotted name in the middle of a key; None if the architecture lacks it."""
        if self.numbered_parts:
            return names.numbered_part_to_diffusers(written)
        if self.underscored:
            return names.underscores_to_dots(written, self.uses_native_names)
        known = (
            names.diffusers_names(written)
            if self.uses_native_names
            else names.locate_in_native(written)
        )
        return written if known or self.prefix == "transformer." else None

    def parse_key(self, key: str, names: ModuleNames) -> tuple[str, str] | None:
        """Return (module, suffix) of a key, or None if the key is not of this layout."""
        suffixes = (
            *self.suffixes,
            ALPHA_SUFFIX,
            ONETRAINER_MAGNITUDE_SUFFIX,
            MAGNITUDE_SUFFIX,
            DORA_SCALE_SUFFIX,
            *(f".{factor}" for factor in LYCORIS_FACTOR_NAMES),
        )
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        if suffix is None or not key.startswith(self.prefix):
            return None
        module = self.parse_module(key[len(self.prefix) : -len(suffix)], names)
        if suffix == ONETRAINER_MAGNITUDE_SUFFIX:
            suffix = MAGNITUDE_SUFFIX
        return None if module is None else (module, suffix)


_KOHYA_SUFFIXES = (".lora_down.weight", ".lora_up.weight")
# Thirteen layouts are in use; "diffusers" occurs with and without alphas and header. The order
# decides between layouts that match all keys: transformer. may precede any name.
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "onetrainer-original": Layout(
            "OneTrainer's original names",
            "transformer.",
            uses_native_names=False,
            suffixes=_KOHYA_SUFFIXES,
            numbered_parts=True,
        ),
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

# Part of a key that is in no layout -> why such a file cannot be loaded.
UNSUPPORTED_KEYS = {
    "lora_te": "has text encoder weights (lora_te*), which are not supported",
    "text_encoder": "has text encoder weights, which are not supported",
    ".lokr_t": "is a LoKr of convolutions, which are not supported",
    ".hada_t": "is a LoHa of convolutions, which are not supported",
    ".oft_": "is an OFT (oft_*), which is not supported",
    "base_model.model.": (
        "is the weight file of a PEFT adapter folder (base_model.model.*), whose alpha is in"
        " another file"
    ),
}


def detect_layout(path: Path, keys: Iterable[str], names: ModuleNames) -> str:
    """Return the layout that every key belongs to. Raises ModelError if there is none."""
    keys = list(keys)
    if not keys:
        raise ModelError(f"{path} holds no LoRA weights")
    matches = {
        name: sum(layout.parse_key(key, names) is not None for key in keys)
        for name, layout in LAYOUTS.items()
    }
    best = max(matches, key=lambda name: matches[name])
    if matches[best] == len(keys):
        return best
    if not any(re.search(r"lora|hada|lokr|oft_|alpha", key) for key in keys):
        raise ModelError(
            f"{path} is a model, not a LoRA of {names.title}: it holds whole weights such as"
            f" {min(keys)!r}"
        )
    for fragment, reason in {**names.unsupported_keys, **UNSUPPORTED_KEYS}.items():
        if any(fragment in key for key in keys):
            raise ModelError(f"{path} {reason}")
    unexpected = next(key for key in keys if LAYOUTS[best].parse_key(key, names) is None)
    if matches[best]:
        raise ModelError(
            f"{path}: {matches[best]} of {len(keys)} keys are of the {LAYOUTS[best].title} layout,"
            f" but {unexpected!r} is not"
        )
    raise ModelError(
        f"{path} is not a LoRA of {names.title}: the key {unexpected!r} is not of any known layout"
    )
