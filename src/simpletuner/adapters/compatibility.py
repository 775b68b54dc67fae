"""What the programs that people sample with make of a LoRA file: their rules as data, with their source.

Read in the programs' code, and tested against diffusers itself and against rewritten rules of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from simpletuner.adapters import module_names
from simpletuner.adapters.deltas import Delta, LycorisDelta
from simpletuner.adapters.layouts import LAYOUTS, LoraFile

RefusalCheck = Callable[[LoraFile], "str | None"]
NON_BLOCK_MODULES = (
    "img_in",
    "txt_in",
    "final_layer.linear",
    "x_embedder",
    "context_embedder",
    "proj_out",
)


@dataclass(frozen=True)
class LoadRule:
    """A program's way with files of one layout.

    strength: "alpha" is alpha / rank by the file's alpha tensors and 1 without; "header" asks PEFT's
    configuration first where there are none; "one" is always 1. why: when it is not plainly applied.
    """

    outcome: Literal["applied", "ignored", "refused"] = "applied"
    strength: Literal["alpha", "header", "one"] = "alpha"
    reason: str = ""


@dataclass(frozen=True)
class ConsumerProgram:
    """limits: each says why a file is refused as a whole, or None. skips: (layout is native, module).

    products: what it makes of LoHa and LoKr, where that is not what it makes of pairs.
    """

    title: str
    source: str
    rules: Mapping[str, LoadRule]
    refusal_checks: tuple[RefusalCheck, ...] = ()
    skips_module: Callable[[bool, str], bool] = lambda native, module: False
    magnitude_layouts: tuple[str, ...] = ()  # layouts in which lora_magnitude_vector is applied
    predict_lycoris_load: Callable[[LoraFile], PredictedLoad] | None = None


@dataclass(frozen=True)
class PredictedLoad:
    """strengths: stored module -> what its delta is multiplied by; absent are the ones passed over."""

    strengths: Mapping[str, float]
    refusal: str = ""
    reason: str = ""


def _refuse_two_alpha_sources(file: LoraFile) -> str | None:
    alphas = any(one.alpha is not None for one in file.modules.values())
    both = file.layout == "diffusers" and file.peft_config and alphas
    return (
        "ValueError: it takes alpha from tensors or from the header, not from both"
        if both
        else None
    )


def _refuse_other_sizes_than_flux(file: LoraFile) -> str | None:
    """Diffusers' converter has Flux's depth and width written into it."""
    if (
        not LAYOUTS[file.layout].uses_native_names
        or DIFFUSERS_RULES[file.layout].outcome == "ignored"
    ):
        return None
    for name, one in file.modules.items():
        template, number = module_names.split_block_number(name)
        if number and int(number) >= (19 if template.startswith("double") else 38):
            return f"ValueError: its converter knows no {name}"
        if template.endswith("linear1") and one.delta.shape[0] != 7 * 3072:
            return "AssertionError: its converter splits linear1 at width 3072 only"
    return None


def _refuse_mixed_onetrainer(file: LoraFile) -> str | None:
    """Diffusers' converter of OneTrainer's names knows attention in the blocks and needs every alpha."""
    if file.layout != "onetrainer":
        return None
    lost = next((name for name in file.modules if "blocks." in name and ".attn." not in name), None)
    if lost is not None:
        return f"KeyError: its converter knows attention only, and the file adapts {lost}"
    without = any(one.alpha is None for one in file.modules.values())
    return "KeyError: its converter needs an alpha for every module" if without else None


def _predict_lycoris_in_diffusers(file: LoraFile) -> PredictedLoad:
    """Diffusers' mixin for Flux and Chroma takes "lora" in some key; LoKr it knows of other models."""
    if "lora" in LAYOUTS[file.layout].prefix:
        return PredictedLoad({}, reason=NO_TRANSFORMER_PREFIX_RULE.reason)
    return PredictedLoad({}, refusal="ValueError: it takes no LoHa and no LoKr of this model")


def _refuse_missing_alpha(file: LoraFile) -> str | None:
    lacking = file.layout == "kohya" and any(one.alpha is None for one in file.modules.values())
    return "KeyError: every module needs an alpha" if lacking else None


def _refuse_many_unmatched_keys(file: LoraFile) -> str | None:
    keys = sum(
        (len(one.delta.factors) if isinstance(one.delta, LycorisDelta) else 2)
        + (one.alpha is not None)
        + (one.dora_scale is not None)
        for one in file.modules.values()
    )
    unknown = FORGE_RULES[file.layout].outcome == "ignored"
    extra = sum(one.magnitude is not None for one in file.modules.values())
    count = keys * unknown + extra
    return (
        f"version mismatch: {count} keys fit nothing, and 12 are tolerated" if count > 12 else None
    )


NO_TRANSFORMER_PREFIX_RULE = LoadRule(
    "ignored", reason="no key begins with transformer.: a warning, and nothing is loaded"
)
NO_MATCHING_KEY_RULE = LoadRule(
    "ignored", reason="no key matches a module; each is logged as not loaded"
)

DIFFUSERS_RULES: Mapping[str, LoadRule] = MappingProxyType(
    {
        "diffusers": LoadRule(strength="header"),
        "transformer-kohya": LoadRule(
            strength="one", reason="the alpha tensors are not read in this layout"
        ),
        "kohya": LoadRule(),
        "comfyui": LoadRule(),
        "comfyui-peft": NO_TRANSFORMER_PREFIX_RULE,
        "comfyui-diffusers": NO_TRANSFORMER_PREFIX_RULE,
        "bare": NO_TRANSFORMER_PREFIX_RULE,
        "onetrainer": LoadRule(),
        "lycoris": LoadRule(
            "refused", reason="ValueError: none of the keys is one that its converter keeps"
        ),
    }
)
COMFYUI_RULES: Mapping[str, LoadRule] = MappingProxyType(
    {
        name: NO_MATCHING_KEY_RULE
        if name == "comfyui-diffusers"
        else LoadRule(reason="the header is not read")
        for name in LAYOUTS
    }
)
FORGE_RULES: Mapping[str, LoadRule] = MappingProxyType(
    {**COMFYUI_RULES, "bare": NO_MATCHING_KEY_RULE}
)
KOHYA_RULES: Mapping[str, LoadRule] = MappingProxyType(
    {
        name: LoadRule()
        if name == "kohya"
        else LoadRule("ignored", reason="only lora_unet_* keys are its own")
        for name in LAYOUTS
    }
)

CONSUMER_PROGRAMS: Mapping[str, ConsumerProgram] = MappingProxyType(
    {
        "diffusers": ConsumerProgram(
            "diffusers",
            "diffusers 0.42.1: FluxLoraLoaderMixin.lora_state_dict, _convert_kohya_flux_lora_to_diffusers, "
            "PeftAdapterMixin.load_lora_adapter",
            DIFFUSERS_RULES,
            (_refuse_two_alpha_sources, _refuse_other_sizes_than_flux, _refuse_mixed_onetrainer),
            # Its converter gives these names without the prefix that its loader then asks for.
            lambda native, module: native and module in NON_BLOCK_MODULES,
            ("diffusers",),
            _predict_lycoris_in_diffusers,
        ),
        "comfyui": ConsumerProgram(
            "ComfyUI",
            "ComfyUI 17358c8: comfy/lora.py load_lora, model_lora_keys_unet; comfy/weight_adapter/lora.py, "
            "loha.py, lokr.py",
            COMFYUI_RULES,
        ),
        "forge": ConsumerProgram(
            "Forge",
            "Forge b6cfd7f: sd_forge_lora/networks.py load_lora_for_models; ersatzForge 5eb0bb5: "
            "comfyui_lora_collection/lora.py model_lora_keys_unet",
            FORGE_RULES,
            (_refuse_many_unmatched_keys,),
        ),
        "kohya": ConsumerProgram(
            "kohya sd-scripts",
            "sd-scripts 0087a46: networks/lora_flux.py create_network_from_weights, LoRANetwork",
            KOHYA_RULES,
            (_refuse_missing_alpha,),
            lambda native, module: module in NON_BLOCK_MODULES,
            predict_lycoris_load=lambda file: PredictedLoad(
                {}, reason="lora_down and lora_up alone are read; LoHa and LoKr are not"
            ),
        ),
    }
)


def predict_load(program: ConsumerProgram, file: LoraFile) -> PredictedLoad:
    """How strongly each module of a file acts in a program, or why it does not."""
    rule = program.rules[file.layout]
    if file.is_lycoris and program.predict_lycoris_load is not None:
        return program.predict_lycoris_load(file)
    limits = (limit(file) for limit in program.refusal_checks)
    refusal = rule.reason if rule.outcome == "refused" else next((why for why in limits if why), "")
    if refusal or rule.outcome != "applied":
        return PredictedLoad({}, refusal, rule.reason)
    native = LAYOUTS[file.layout].uses_native_names
    kept = (name for name in file.modules if not program.skips_module(native, name))
    return PredictedLoad(
        {name: _module_strength(rule, file, name) for name in kept}, reason=rule.reason
    )


def applied_deltas(program: ConsumerProgram, file: LoraFile) -> dict[str, Delta]:
    """The deltas that a program adds, by diffusers module; nothing for a file it refuses."""
    found: dict[str, Delta] = {}
    for name, strength in predict_load(program, file).strengths.items():
        magnitude = (
            file.modules[name].magnitude if file.layout in program.magnitude_layouts else None
        )
        found |= file.split_module(name, strength, magnitude)
    return found


def loses_magnitude(program: ConsumerProgram, file: LoraFile, name: str) -> bool:
    """Of a DoRA. ComfyUI and Forge divide dora_scale by other norms than LyCORIS and PEFT train with."""
    one = file.modules[name]
    peft = one.magnitude is not None and file.layout not in program.magnitude_layouts
    return peft or one.dora_scale is not None


def _module_strength(rule: LoadRule, file: LoraFile, name: str) -> float:
    own = file.modules[name].scale
    told = file.peft_config_scale(name) if rule.strength == "header" and own is None else None
    return told if told is not None else 1.0 if rule.strength == "one" or own is None else own
