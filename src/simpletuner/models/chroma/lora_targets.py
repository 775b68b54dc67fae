"""Modules that LoRA presets adapt; never the approximator, the embedders or the final proj_out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from simpletuner.config.option_values import did_you_mean
from simpletuner.config.patterns import full_matches
from simpletuner.errors import ConfigError

TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", *TEXT_ATTENTION)
TEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", *TEXT_FEED_FORWARD, "proj_mlp", "proj_out")
PRESET_SUFFIXES = {
    "all": ATTENTION,
    "context": TEXT_ATTENTION,
    "context+ffs": (*TEXT_ATTENTION, *TEXT_FEED_FORWARD),
    "all+ffs": (*ATTENTION, *FEED_FORWARD),
}
PRESET_MODULES = {
    "tiny": ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"),
    "nano": ("single_transformer_blocks.7.proj_out",),
}
# Class of diffusers -> how the names of its modules are recognised, the innermost class first.
CLASS_PATTERNS = {
    "Attention": re.compile(r".*\.attn\."),
    "FeedForward": re.compile(r".*\.(ff|ff_context)\."),
    "ChromaTransformerBlock": re.compile(r"transformer_blocks\."),
    "ChromaSingleTransformerBlock": re.compile(r"single_transformer_blocks\."),
}
APPROXIMATOR_PREFIX = "distilled_guidance_layer."
BLOCK_PREFIXES = ("transformer_blocks.", "single_transformer_blocks.")


def preset_targets(transformer: nn.Module, preset: str) -> list[str]:
    """Return the full module names of a preset, in the network's order.

    Raises ConfigError when the network lacks a module of the preset.
    """
    names = [name for name, _ in transformer.named_modules() if name.startswith(BLOCK_PREFIXES)]
    if preset in PRESET_SUFFIXES:
        endings = tuple(f".{suffix}" for suffix in PRESET_SUFFIXES[preset])
        return [name for name in names if name.endswith(endings)]
    missing = [name for name in PRESET_MODULES[preset] if name not in names]
    if missing:
        raise ConfigError(
            f'flux_lora_target "{preset}" adapts {", ".join(PRESET_MODULES[preset])}, but this'
            f' transformer does not have {", ".join(missing)}. Use "all".'
        )
    return list(PRESET_MODULES[preset])


def matching_targets(transformer: nn.Module, chosen: str | Sequence[str]) -> list[str]:
    """Return linears by a regular expression for whole names, or by names and name endings.

    Raises ConfigError when an entry matches nothing, or a module that must not be adapted.
    """
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(chosen, str):
        try:
            matched = {chosen: full_matches(chosen, names)}
        except ValueError as error:
            raise ConfigError(f"lora_target_modules: {chosen[:100]!r} {error}") from error
    else:
        matched = {
            entry: [n for n in names if n == entry or n.endswith(f".{entry}")] for entry in chosen
        }
    for pattern, matches in matched.items():
        if not matches:
            endings = sorted(
                {
                    re.sub(r"^.*?\.\d+\.", "", name)
                    for name in names
                    if name.startswith(BLOCK_PREFIXES)
                }
            )
            hint = (
                did_you_mean(pattern, endings, 0.6)
                or f"; the linears of a block end with {', '.join(endings)}"
            )
            raise ConfigError(
                f"lora_target_modules: {pattern!r} matches no linear of the transformer{hint}"
            )
    matched_names = {name for matches in matched.values() for name in matches}
    if approximator_names := sorted(
        name for name in matched_names if name.startswith(APPROXIMATOR_PREFIX)
    ):
        raise ConfigError(
            f"lora_target_modules matches {approximator_names[0]}, but the approximator must not be"
            " adapted, because that breaks the model"
        )
    return [name for name in names if name in matched_names]


def linear_classes(transformer: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return every linear outside the approximator, with its classes from CLASS_PATTERNS."""
    return {
        name: tuple(kind for kind, pattern in CLASS_PATTERNS.items() if pattern.match(name))
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(APPROXIMATOR_PREFIX)
    }
