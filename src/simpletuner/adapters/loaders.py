"""What the programs that people sample with make of a LoRA file: their rules as data, with their source.

Read in the programs' code, and tested against diffusers itself and against rewritten rules of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from simpletuner.adapters import names
from simpletuner.adapters.deltas import Delta, Product
from simpletuner.adapters.layouts import LAYOUTS, LoraFile

Limit = Callable[[LoraFile], "str | None"]
OUTSIDE_BLOCKS = ("img_in", "txt_in", "final_layer.linear", "x_embedder", "context_embedder", "proj_out")


@dataclass(frozen=True)
class Rule:
    """A program's way with files of one layout.

    strength: "alpha" is alpha / rank by the file's alpha tensors and 1 without; "header" asks PEFT's
    configuration first where there are none; "one" is always 1. why: when it is not plainly applied.
    """

    outcome: Literal["applied", "ignored", "refused"] = "applied"
    strength: Literal["alpha", "header", "one"] = "alpha"
    why: str = ""


@dataclass(frozen=True)
class Program:
    """limits: each says why a file is refused as a whole, or None. skips: (layout is native, module).

    products: what it makes of LoHa and LoKr, where that is not what it makes of pairs.
    """

    title: str
    source: str
    rules: Mapping[str, Rule]
    limits: tuple[Limit, ...] = ()
    skips: Callable[[bool, str], bool] = lambda native, module: False
    magnitude: tuple[str, ...] = ()  # layouts in which lora_magnitude_vector is applied
    products: Callable[[LoraFile], Reading] | None = None


@dataclass(frozen=True)
class Reading:
    """strengths: stored module -> what its delta is multiplied by; absent are the ones passed over."""

    strengths: Mapping[str, float]
    refusal: str = ""
    why: str = ""


def _both_alphas(file: LoraFile) -> str | None:
    alphas = any(one.alpha is not None for one in file.modules.values())
    both = file.layout == "diffusers" and file.header and alphas
    return "ValueError: it takes alpha from tensors or from the header, not from both" if both else None


def _flux_sizes(file: LoraFile) -> str | None:
    """diffusers' converter has Flux's depth and width written into it."""
    if not LAYOUTS[file.layout].native or DIFFUSERS[file.layout].outcome == "ignored":
        return None
    for name, one in file.modules.items():
        template, number = names.split_number(name)
        if number and int(number) >= (19 if template.startswith("double") else 38):
            return f"ValueError: its converter knows no {name}"
        if template.endswith("linear1") and one.delta.shape[0] != 7 * 3072:
            return "AssertionError: its converter splits linear1 at width 3072 only"
    return None


def _mixture(file: LoraFile) -> str | None:
    """diffusers' converter of OneTrainer's names knows attention in the blocks and needs every alpha."""
    if file.layout != "onetrainer":
        return None
    lost = next((name for name in file.modules if "blocks." in name and ".attn." not in name), None)
    if lost is not None:
        return f"KeyError: its converter knows attention only, and the file adapts {lost}"
    without = any(one.alpha is None for one in file.modules.values())
    return "KeyError: its converter needs an alpha for every module" if without else None


def _lora_in_the_name(file: LoraFile) -> Reading:
    """diffusers' mixin for Flux and Chroma takes "lora" in some key; LoKr it knows of other models."""
    if "lora" in LAYOUTS[file.layout].prefix:
        return Reading({}, why=NO_TRANSFORMER.why)
    return Reading({}, refusal="ValueError: it takes no LoHa and no LoKr of this model")


def _needs_alpha(file: LoraFile) -> str | None:
    lacking = file.layout == "kohya" and any(one.alpha is None for one in file.modules.values())
    return "KeyError: every module needs an alpha" if lacking else None


def _too_many_unmatched(file: LoraFile) -> str | None:
    keys = sum(
        (len(one.delta.parts) if isinstance(one.delta, Product) else 2)
        + (one.alpha is not None) + (one.dora_scale is not None)
        for one in file.modules.values()
    )  # fmt: skip
    unknown = FORGE[file.layout].outcome == "ignored"
    extra = sum(one.magnitude is not None for one in file.modules.values())
    count = keys * unknown + extra
    return f"version mismatch: {count} keys fit nothing, and 12 are tolerated" if count > 12 else None


NO_TRANSFORMER = Rule("ignored", why="no key begins with transformer.: a warning, and nothing is loaded")
NO_KEY = Rule("ignored", why="no key matches a module; each is logged as not loaded")

DIFFUSERS: Mapping[str, Rule] = MappingProxyType({
    "diffusers": Rule(strength="header"),
    "transformer-kohya": Rule(strength="one", why="the alpha tensors are not read in this layout"),
    "kohya": Rule(),
    "comfyui": Rule(),
    "comfyui-peft": NO_TRANSFORMER,
    "comfyui-diffusers": NO_TRANSFORMER,
    "bare": NO_TRANSFORMER,
    "onetrainer": Rule(),
    "lycoris": Rule("refused", why="ValueError: none of the keys is one that its converter keeps"),
})  # fmt: skip
COMFYUI: Mapping[str, Rule] = MappingProxyType({
    name: NO_KEY if name == "comfyui-diffusers" else Rule(why="the header is not read") for name in LAYOUTS
})  # fmt: skip
FORGE: Mapping[str, Rule] = MappingProxyType({**COMFYUI, "bare": NO_KEY})
KOHYA: Mapping[str, Rule] = MappingProxyType({
    name: Rule() if name == "kohya" else Rule("ignored", why="only lora_unet_* keys are its own")
    for name in LAYOUTS
})  # fmt: skip

PROGRAMS: Mapping[str, Program] = MappingProxyType({
    "diffusers": Program(
        "diffusers",
        "diffusers 0.42.1: FluxLoraLoaderMixin.lora_state_dict, _convert_kohya_flux_lora_to_diffusers, "
        "PeftAdapterMixin.load_lora_adapter",
        DIFFUSERS, (_both_alphas, _flux_sizes, _mixture),
        # Its converter gives these names without the prefix that its loader then asks for.
        lambda native, module: native and module in OUTSIDE_BLOCKS, ("diffusers",), _lora_in_the_name,
    ),
    "comfyui": Program(
        "ComfyUI",
        "ComfyUI 17358c8: comfy/lora.py load_lora, model_lora_keys_unet; comfy/weight_adapter/lora.py, "
        "loha.py, lokr.py",
        COMFYUI,
    ),
    "forge": Program(
        "Forge",
        "Forge b6cfd7f: sd_forge_lora/networks.py load_lora_for_models; ersatzForge 5eb0bb5: "
        "comfyui_lora_collection/lora.py model_lora_keys_unet",
        FORGE, (_too_many_unmatched,),
    ),
    "kohya": Program(
        "kohya sd-scripts",
        "sd-scripts 0087a46: networks/lora_flux.py create_network_from_weights, LoRANetwork",
        KOHYA, (_needs_alpha,), lambda native, module: module in OUTSIDE_BLOCKS,
        products=lambda file: Reading({}, why="lora_down and lora_up alone are read; LoHa and LoKr are not"),
    ),
})  # fmt: skip


def reading(program: Program, file: LoraFile) -> Reading:
    """How strongly each module of a file acts in a program, or why it does not."""
    rule = program.rules[file.layout]
    if file.is_product and program.products is not None:
        return program.products(file)
    limits = (limit(file) for limit in program.limits)
    refusal = rule.why if rule.outcome == "refused" else next((why for why in limits if why), "")
    if refusal or rule.outcome != "applied":
        return Reading({}, refusal, rule.why)
    native = LAYOUTS[file.layout].native
    kept = (name for name in file.modules if not program.skips(native, name))
    return Reading({name: _strength(rule, file, name) for name in kept}, why=rule.why)


def applied(program: Program, file: LoraFile) -> dict[str, Delta]:
    """The deltas that a program adds, by diffusers module; nothing for a file it refuses."""
    found: dict[str, Delta] = {}
    for name, strength in reading(program, file).strengths.items():
        magnitude = file.modules[name].magnitude if file.layout in program.magnitude else None
        found |= file.split(name, strength, magnitude)
    return found


def loses_magnitude(program: Program, file: LoraFile, name: str) -> bool:
    """Of a DoRA. ComfyUI and Forge divide dora_scale by other norms than LyCORIS and PEFT train with."""
    one = file.modules[name]
    peft = one.magnitude is not None and file.layout not in program.magnitude
    return peft or one.dora_scale is not None


def _strength(rule: Rule, file: LoraFile, name: str) -> float:
    own = file.modules[name].scale
    told = file.header_scale(name) if rule.strength == "header" and own is None else None
    return told if told is not None else 1.0 if rule.strength == "one" or own is None else own
