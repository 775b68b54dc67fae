"""The modules that apply_preset in lycoris_config chooses, and the settings of each."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from simpletuner.config.lycoris_config import LycorisConfig, LycorisPreset
from simpletuner.config.model_families import DEFAULT_LYCORIS_CLASSES
from simpletuner.config.patterns import full_matches
from simpletuner.errors import ConfigError


def choose_lycoris_modules(
    config: LycorisConfig, preset: LycorisPreset, linear_classes: Mapping[str, Sequence[str]]
) -> dict[str, LycorisConfig]:
    """Return the settings of each linear that the preset chooses, in the order of the network.

    linear_classes: name of a linear -> the classes of the modules around it, innermost first.
    The settings of a name count before those of a class. Raises ConfigError for a pattern that
    matches nothing, and for a preset that chooses nothing.
    """
    linears = list(linear_classes)
    classes = preset.classes or (() if preset.names else DEFAULT_LYCORIS_CLASSES)
    chosen = {name for name in linears if not set(classes).isdisjoint(linear_classes[name])}
    for pattern in preset.names:
        matched = _match_names(pattern, linears, preset.wildcards)
        if not matched:
            raise ConfigError(
                f"lycoris_config: target_name {pattern!r} matches no linear of the transformer"
            )
        chosen.update(matched)
    for pattern in preset.excluded:
        chosen.difference_update(_match_names(pattern, linears, preset.wildcards))
    if not chosen:
        raise ConfigError("lycoris_config: apply_preset chooses no linear of the transformer")
    settings = {name: config for name in linears if name in chosen}
    for name in settings:
        own = (preset.by_class[kind] for kind in linear_classes[name] if kind in preset.by_class)
        settings[name] = next(own, config)
    for pattern, replacement in preset.by_name.items():
        for name in _match_names(pattern, list(settings), preset.wildcards):
            settings[name] = replacement
    return settings


def _match_names(pattern: str, names: Sequence[str], wildcards: bool) -> list[str]:
    if wildcards:
        return fnmatch.filter(names, pattern)
    try:
        return full_matches(f"(?:{pattern}).*", names)
    except ValueError as error:
        raise ConfigError(f"lycoris_config: {pattern!r} {error}") from error
