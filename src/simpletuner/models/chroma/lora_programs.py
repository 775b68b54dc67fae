"""Rules by which diffusers, ComfyUI, Forge and kohya's tools load LoRA files of Chroma.

The rules were read in the programs' code, and are tested against diffusers itself and against
reimplementations of the other programs' rules. The loading functions of ComfyUI, Forge and
sd-scripts, at the revisions that `source` names, were also run by hand on files that are written
here, and on files with other keys: docs/lora-files.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from simpletuner.adapters.compatibility import (
    ConsumerProgram,
    KeyLookup,
    LoadRule,
    LoraConventions,
    PredictedLoad,
)
from simpletuner.adapters.deltas import LycorisDelta
from simpletuner.adapters.key_forms import OTHER_FORMS, PAIR_FORMS
from simpletuner.adapters.layouts import LAYOUTS
from simpletuner.adapters.lora_file import LoraFile
from simpletuner.adapters.module_names import split_block_number
from simpletuner.models.chroma.module_names import CHROMA_MODULE_NAMES

# Sizes that diffusers' converter of native names assumes.
FLUX_WIDTH = 3072
FLUX_DOUBLE_BLOCKS = 19
FLUX_SINGLE_BLOCKS = 38
FORGE_TOLERATED_KEYS = 12

NO_TRANSFORMER_PREFIX_RULE = LoadRule(
    "ignored", reason="no key begins with transformer.; it warns and loads nothing"
)
NO_MATCHING_KEY_RULE = LoadRule(
    "ignored", reason="no key matches a module; each is logged as not loaded"
)
DIFFUSERS_RULES: Mapping[str, LoadRule] = MappingProxyType(
    {
        "diffusers": LoadRule(strength="header"),
        "transformer-kohya": LoadRule(
            strength="one", reason="it does not read alpha tensors in this layout"
        ),
        "kohya": LoadRule(),
        "comfyui": LoadRule(),
        "comfyui-peft": NO_TRANSFORMER_PREFIX_RULE,
        "comfyui-diffusers": NO_TRANSFORMER_PREFIX_RULE,
        "bare": NO_TRANSFORMER_PREFIX_RULE,
        "onetrainer": LoadRule(),
        "onetrainer-original": LoadRule(
            "refused", reason="NoMatchingPeftModuleError: it finds none of the modules"
        ),
        "lycoris": LoadRule(
            "refused", reason="ValueError: its converter does not recognize any of the keys"
        ),
    }
)
COMFYUI_RULES: Mapping[str, LoadRule] = MappingProxyType(
    {
        layout: NO_MATCHING_KEY_RULE
        if layout in ("comfyui-diffusers", "onetrainer-original")
        else LoadRule(reason="it does not read alpha from the header")
        for layout in LAYOUTS
    }
)
# Up to this version no key without a prefix is matched.
OLDER_COMFYUI_RULES: Mapping[str, LoadRule] = MappingProxyType(
    {**COMFYUI_RULES, "bare": NO_MATCHING_KEY_RULE}
)
# Forge matches diffusers' names only where its name of the model has "flux" in it; since
# 2025-06-23 it calls this one Chroma. Native names are read from the weights themselves.
FORGE_LAYOUTS = ("kohya", "comfyui", "comfyui-peft")
FORGE_RULES: Mapping[str, LoadRule] = MappingProxyType(
    {
        layout: COMFYUI_RULES[layout]
        if layout in FORGE_LAYOUTS
        else LoadRule("ignored", reason="it only matches native names; use --format kohya")
        for layout in LAYOUTS
    }
)
KOHYA_RULES: Mapping[str, LoadRule] = MappingProxyType(
    {
        layout: LoadRule()
        if layout == "kohya"
        else LoadRule("ignored", reason="it only recognizes lora_unet_* keys; use --format kohya")
        for layout in LAYOUTS
    }
)

APPROXIMATOR = ("distilled_guidance_layer",)
COMFYUI_LOOKUP = KeyLookup(
    native_prefixes=("lora_unet_", "diffusion_model."),
    diffusers_prefixes=("transformer.", "lycoris_", "lora_transformer_", ""),
    forms=(*PAIR_FORMS, *OTHER_FORMS),
    attached=frozenset({".alpha", ".dora_scale", ".lora_mid.weight", ".reshape_weight"}),
    applies_input_magnitudes=True,
    other_native_modules=APPROXIMATOR,
    aliases=((".linear1_qkv", ".linear1"),),
)
OLDER_COMFYUI_LOOKUP = replace(
    COMFYUI_LOOKUP, diffusers_prefixes=("transformer.", "lycoris_", "lora_transformer_")
)
FORGE_LOOKUP = KeyLookup(
    native_prefixes=("lora_unet_", "diffusion_model."),
    diffusers_prefixes=(),
    forms=(
        "lora_down/up",
        "lora_A/B",
        ".lora.down/up",
        "_lora.down/up",
        "lora_linear_layer",
        "LoHa",
        "LoKr",
        "full delta",
        "whole weight",
    ),
    attached=frozenset({".alpha", ".dora_scale", ".lora_mid.weight"}),
    tolerated_keys=FORGE_TOLERATED_KEYS,
    applies_input_magnitudes=True,
    other_native_modules=APPROXIMATOR,
)
KOHYA_LOOKUP = KeyLookup(
    native_prefixes=("lora_unet_",),
    diffusers_prefixes=(),
    forms=("lora_down/up",),
    attached=frozenset({".alpha"}),
    fails_without="B",
    needs_alpha=True,
    only_matrices=True,
    unmatched_note="flux_minimal_inference.py refuses it unless --merge_lora_weights is given",
)


def _refuse_two_alpha_sources(file: LoraFile) -> str | None:
    has_alphas = any(module.alpha is not None for module in file.modules.values())
    if file.layout == "diffusers" and file.peft_config and has_alphas:
        return "ValueError: it takes alpha from tensors or from the header, but not from both"
    return None


def _refuse_other_sizes_than_flux(file: LoraFile) -> str | None:
    """Refuse what diffusers' converter cannot split, since it assumes Flux's depth and width."""
    if not file.uses_native_names or DIFFUSERS_RULES[file.layout].outcome == "ignored":
        return None
    for name, module in file.modules.items():
        template, number = split_block_number(name)
        blocks = FLUX_DOUBLE_BLOCKS if template.startswith("double") else FLUX_SINGLE_BLOCKS
        if number and int(number) >= blocks:
            return f"ValueError: its converter does not know {name}"
        if template.endswith("linear1") and module.delta.shape[0] != 7 * FLUX_WIDTH:
            return "AssertionError: its converter only supports full-size Chroma (width 3072)"
    return None


def _refuse_mixed_onetrainer(file: LoraFile) -> str | None:
    """Refuse what diffusers' converter of OneTrainer's names cannot read.

    Inside the blocks it knows only attention, and it needs an alpha for every module.
    """
    if file.layout != "onetrainer":
        return None
    unknown = next(
        (name for name in file.modules if "blocks." in name and ".attn." not in name), None
    )
    if unknown is not None:
        return f"KeyError: its converter only supports attention, but the file adapts {unknown}"
    lacks_alpha = any(module.alpha is None for module in file.modules.values())
    return "KeyError: its converter needs an alpha for every module" if lacks_alpha else None


def _refuse_missing_alpha(file: LoraFile) -> str | None:
    lacks_alpha = any(module.alpha is None for module in file.modules.values())
    if file.layout == "kohya" and lacks_alpha:
        return "KeyError: it needs an alpha for every module"
    return None


def _refuse_many_unmatched_keys(file: LoraFile) -> str | None:
    keys = sum(
        (len(module.delta.factors) if isinstance(module.delta, LycorisDelta) else 2)
        + (module.alpha is not None)
        + (module.dora_scale is not None)
        for module in file.modules.values()
    )
    is_unknown = FORGE_RULES[file.layout].outcome == "ignored"
    magnitudes = sum(module.magnitude is not None for module in file.modules.values())
    count = keys * is_unknown + magnitudes
    if count > FORGE_TOLERATED_KEYS:
        return (
            f"version mismatch: {count} keys match nothing, and it tolerates {FORGE_TOLERATED_KEYS}"
        )
    return None


def _predict_lycoris_in_diffusers(file: LoraFile) -> PredictedLoad:
    """Predict what diffusers' loader for Flux and Chroma does, which looks for "lora" in a key."""
    if "lora" in LAYOUTS[file.layout].prefix:
        return PredictedLoad({}, reason=NO_TRANSFORMER_PREFIX_RULE.reason)
    return PredictedLoad({}, refusal="ValueError: it does not support LoHa and LoKr of this model")


def _predict_lycoris_in_kohya(file: LoraFile) -> PredictedLoad:
    return PredictedLoad({}, reason="it reads only lora_down and lora_up, not LoHa and LoKr")


def _is_outside_blocks(module: str) -> bool:
    return module in CHROMA_MODULE_NAMES.modules_outside_blocks


CHROMA_LORA = LoraConventions(
    names=CHROMA_MODULE_NAMES,
    programs=MappingProxyType(
        {
            "diffusers": ConsumerProgram(
                title="diffusers",
                version="0.42.1",
                source=(
                    "diffusers 0.42.1: FluxLoraLoaderMixin.lora_state_dict,"
                    " _convert_kohya_flux_lora_to_diffusers, PeftAdapterMixin.load_lora_adapter"
                ),
                rules=DIFFUSERS_RULES,
                refusal_checks=(
                    _refuse_two_alpha_sources,
                    _refuse_other_sizes_than_flux,
                    _refuse_mixed_onetrainer,
                ),
                # Its converter writes these names without the prefix that its loader then expects.
                skips_module=lambda native, module: native and _is_outside_blocks(module),
                magnitude_layouts=("diffusers",),
                predict_lycoris_load=_predict_lycoris_in_diffusers,
            ),
            "comfyui": ConsumerProgram(
                title="ComfyUI",
                version="17358c8",
                source=(
                    "ComfyUI 17358c8: comfy/lora.py load_lora, model_lora_keys_unet;"
                    " comfy/weight_adapter/lora.py, loha.py, lokr.py"
                ),
                rules=COMFYUI_RULES,
                key_lookup=COMFYUI_LOOKUP,
            ),
            "comfyui-0.8.0": ConsumerProgram(
                title="ComfyUI",
                version="0.3.64-0.8.0",
                source="ComfyUI 0.3.64 and 0.8.0: comfy/lora.py load_lora, model_lora_keys_unet",
                rules=OLDER_COMFYUI_RULES,
                key_lookup=OLDER_COMFYUI_LOOKUP,
            ),
            "forge": ConsumerProgram(
                title="Forge",
                version="2025-06-26",
                source=(
                    "Forge of 2025-06-26: sd_forge_lora/networks.py load_lora_for_models;"
                    " comfyui_lora_collection/lora.py load_lora, model_lora_keys_unet"
                ),
                rules=FORGE_RULES,
                refusal_checks=(_refuse_many_unmatched_keys,),
                key_lookup=FORGE_LOOKUP,
            ),
            "kohya": ConsumerProgram(
                title="kohya sd-scripts",
                version="0087a46",
                source=(
                    "sd-scripts 0087a46: networks/lora_flux.py create_network_from_weights,"
                    " LoRANetwork"
                ),
                rules=KOHYA_RULES,
                refusal_checks=(_refuse_missing_alpha,),
                skips_module=lambda native, module: _is_outside_blocks(module),
                predict_lycoris_load=_predict_lycoris_in_kohya,
                key_lookup=KOHYA_LOOKUP,
            ),
        }
    ),
    verified_programs=MappingProxyType(
        {
            "diffusers": ("diffusers", "comfyui", "comfyui-0.8.0"),
            "kohya": ("kohya", "forge", "comfyui", "comfyui-0.8.0"),
            "comfyui": ("comfyui", "comfyui-0.8.0", "forge"),
            "lycoris": ("comfyui", "comfyui-0.8.0"),
        }
    ),
    lycoris_programs=("comfyui", "comfyui-0.8.0", "forge"),
    width=FLUX_WIDTH,
)
