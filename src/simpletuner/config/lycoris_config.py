"""The options in lycoris_config by LyCORIS' names: LoHa or LoKr, its size and strength."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simpletuner.bounded_files import read_bounded_text
from simpletuner.config.model_families import FOREIGN_LYCORIS_CLASSES, LYCORIS_CLASSES
from simpletuner.config.patterns import pattern_problem
from simpletuner.config.sections_model import AdapterOptions
from simpletuner.errors import ConfigError

ALGOS = ("lokr", "loha")
MAX_FILE_BYTES = 1 << 20
UNUSED_DEFAULT_PATH = "config/lycoris_config.json"  # saved by web forms that use none
EXAMPLE_CONFIG = '{"algo": "lokr", "linear_dim": 16, "linear_alpha": 16}'
# Key -> values that ask for what happens anyway, and why no other is taken.
FIXED_KEYS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "multiplier": ((1, None), "strength is linear_alpha / linear_dim"),
    "dropout": ((0, None), "use lora_dropout"),
    "rank_dropout": ((0, None), "use lora_dropout"),
    "module_dropout": ((0, None), "use lora_dropout"),
    "weight_decompose": ((False, None), "programs scale LyCORIS' magnitudes differently"),
    "dora_wd": ((False, None), "programs scale LyCORIS' magnitudes differently"),
    "train_norm": ((False, None), "norms are not trained"),
    "use_scalar": ((False, None), "it starts the same delta in another way"),
    "rs_lora": ((False, None), "raise linear_alpha"),
    "unbalanced_factorization": ((False, None), "it is not supported"),
    "use_tucker": ((False, True, None), ""),  # of convolutions alone, as the two below
    "conv_dim": ((), ""),
    "conv_alpha": ((), ""),
    "bypass_mode": ((False, True, None), ""),
}
# Algorithms of LyCORIS that are not here, and the nearest that is.
OTHER_ALGOS: Mapping[str, str] = {
    "full": 'model_type "full", or algo "lokr" with full_matrix true',
    "dylora": 'lora_type "standard"',
    "ia3": 'algo "lokr" with a small linear_dim',
    "glora": 'algo "lokr"',
    "glokr": 'algo "lokr"',
    "boft": 'algo "lokr"',
    "diag-oft": 'algo "lokr"',
    "abba": 'algo "loha"',
    "tlora": 'lora_type "standard"',
}
OWN_KEYS = ("algo", "linear_dim", "linear_alpha", "factor", "full_matrix", "decompose_both")
LOKR_KEYS = ("factor", "full_matrix", "decompose_both")
# Names of LyCORIS for keys of the settings of a class.
SHORT_KEYS = {"dim": "linear_dim", "alpha": "linear_alpha"}


@dataclass(frozen=True)
class LycorisPreset:
    """apply_preset: which modules are adapted, and the settings that differ from the common ones.

    classes: of the modules whose linears are adapted; empty is the family's default. names:
    patterns of further modules. excluded: patterns of modules that are not adapted. by_class,
    by_name: settings of a class, or of the modules that match a pattern. Patterns are regular
    expressions that match the beginning of a name, or all of it with the wildcard * (wildcards).
    """

    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    by_class: Mapping[str, LycorisConfig] = field(default_factory=dict)
    by_name: Mapping[str, LycorisConfig] = field(default_factory=dict)
    wildcards: bool = False


@dataclass(frozen=True)
class LycorisConfig:
    """Settings of a LoHa or LoKr. dim: LoHa's rank, and that of LoKr's pairs.

    alpha: the strength is alpha / dim. factor: rows and columns of LoKr's w1, as near as they
    divide; -1 is near the square root. full_matrix: do not decompose w2, whatever dim is.
    decompose_both: decompose w1 too where dim is small. preset: None is one setting for the modules
    that flux_lora_target or lora_target_modules choose.
    """

    algo: str
    dim: int
    alpha: float
    factor: int = -1
    full_matrix: bool = False
    decompose_both: bool = False
    preset: LycorisPreset | None = None


def require_lycoris_config(options: AdapterOptions) -> LycorisConfig:
    """Return the LyCORIS settings of a run with lora_type "lycoris"."""
    if not isinstance(options.lycoris_config, dict):
        raise ConfigError(f'lora_type "lycoris" needs a file or an object such as {EXAMPLE_CONFIG}')
    return parse_lycoris_config(options.lycoris_config)


def describe_adapter(options: AdapterOptions) -> str:
    """Return "rank 16 LoRA" or "LoKr (linear_dim 16)"."""
    if options.lora_type == "standard":
        others = " with ranks by module" if options.lora_rank_by_module else ""
        return f"rank {options.lora_rank} {'DoRA' if options.use_dora else 'LoRA'}{others}"
    config = require_lycoris_config(options)
    return f"{'LoKr' if config.algo == 'lokr' else 'LoHa'} (linear_dim {config.dim})"


def parse_lycoris_config(config: Mapping[str, Any]) -> LycorisConfig:
    """Parse the object. Raises ConfigError with the first thing that is not allowed."""
    common = {key: value for key, value in config.items() if key != "apply_preset"}
    parsed = _parse_settings(common)
    preset = config.get("apply_preset")
    return replace(parsed, preset=_parse_preset(preset, common)) if preset else parsed


def algos_of(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the algorithms of all modules; that of the object itself where it is not valid."""
    try:
        parsed = parse_lycoris_config(config)
    except ConfigError:
        return frozenset({str(config.get("algo"))})
    preset = parsed.preset or LycorisPreset()
    others = (*preset.by_class.values(), *preset.by_name.values())
    return frozenset({parsed.algo, *(other.algo for other in others)})


def find_class_problems(config: LycorisConfig, family: str) -> tuple[str, tuple[str, ...]]:
    """Return (why the classes of a preset choose nothing, or "", the unknown ones among them)."""
    known = LYCORIS_CLASSES.get(family, ())
    preset = config.preset or LycorisPreset()
    unknown = tuple(name for name in preset.classes if name not in known)
    if unknown and len(unknown) == len(preset.classes) and not preset.names:
        return (
            f"target_module = {json.dumps(list(unknown))} names classes of other models; {family} "
            f"has {', '.join(known)}",
            unknown,
        )
    return "", unknown


def replace_foreign_classes(
    config: Mapping[str, Any], family: str
) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Return the object for this family, and the classes that each foreign one was replaced by.

    Only an object whose target_module names no class of the family is changed, and only if each of
    them resembles one, as an object written for another model.
    """
    preset = config.get("apply_preset")
    preset = preset if isinstance(preset, dict) else {}
    names = preset.get("target_module")
    known = LYCORIS_CLASSES.get(family, ())
    if not isinstance(names, list) or not names or any(name in known for name in names):
        return dict(config), {}
    overrides = preset.get("module_algo_map")
    overrides = overrides if isinstance(overrides, dict) else {}
    similar = {name: _similar_classes(name, family) for name in (*names, *overrides)}
    if not all(similar[name] for name in names):
        return dict(config), {}
    own = list(dict.fromkeys(kind for name in names for kind in similar[name]))
    settings = {
        kind: given for name, given in overrides.items() for kind in similar[name] or [name]
    }
    changed = {**preset, "target_module": own, "module_algo_map": settings}
    return {**config, "apply_preset": changed}, {name: similar[name] for name in names}


def _similar_classes(name: Any, family: str) -> tuple[str, ...]:
    patterns = FOREIGN_LYCORIS_CLASSES.get(family, {})
    matching = (own for pattern, own in patterns.items() if re.search(pattern, str(name)))
    return next(matching, ())


def _parse_preset(preset: Any, common: Mapping[str, Any]) -> LycorisPreset:
    """Parse apply_preset. Settings of a class replace single values of the common ones."""
    if not isinstance(preset, dict):
        raise ConfigError(
            'apply_preset must be an object such as {"target_module": ["Attention"]}, not '
            f"{json.dumps(preset)}"
        )
    lists = ("target_module", "target_name", "exclude_name")
    maps = ("module_algo_map", "name_algo_map")
    known = (*lists, *maps, "use_fnmatch", "enable_conv", "lora_prefix")
    for key, value in preset.items():
        if key not in known:
            raise ConfigError(f"apply_preset.{key}: unknown; it takes {', '.join(known)}")
        is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if key in lists and value is not None and not is_list:
            raise ConfigError(f"apply_preset.{key} must be a list of names")
        if key in maps and value is not None and not isinstance(value, dict):
            raise ConfigError(f"apply_preset.{key} must be an object of name -> settings")
    wildcards = bool(preset.get("use_fnmatch", False))
    names, excluded = (tuple(preset.get(key) or ()) for key in ("target_name", "exclude_name"))
    by_name = preset.get("name_algo_map") or {}
    for pattern in () if wildcards else (*names, *excluded, *by_name):
        if problem := pattern_problem(pattern):
            raise ConfigError(f"apply_preset: {pattern!r} {problem}")
    return LycorisPreset(
        classes=tuple(preset.get("target_module") or ()),
        names=names,
        excluded=excluded,
        by_class=_parse_overrides("module_algo_map", preset, common),
        by_name=_parse_overrides("name_algo_map", preset, common),
        wildcards=wildcards,
    )


def _parse_overrides(
    key: str, preset: Mapping[str, Any], common: Mapping[str, Any]
) -> dict[str, LycorisConfig]:
    parsed: dict[str, LycorisConfig] = {}
    for name, given in (preset.get(key) or {}).items():
        if not isinstance(given, dict):
            raise ConfigError(f"apply_preset.{key}.{name} must be an object of settings")
        own: dict[str, Any] = {
            SHORT_KEYS.get(str(setting), str(setting)): value for setting, value in given.items()
        }
        shared = dict(common)
        if own.get("algo", common.get("algo")) != "lokr":
            shared = {key: value for key, value in common.items() if key not in LOKR_KEYS}
        try:
            parsed[name] = _parse_settings({**shared, **own})
        except ConfigError as error:
            raise ConfigError(f"apply_preset.{key}.{name}: {error}") from error
    return parsed


def _parse_settings(config: Mapping[str, Any]) -> LycorisConfig:
    """Parse the settings of all modules, or of a group of modules."""
    algo, dim, factor = config.get("algo"), config.get("linear_dim", 16), config.get("factor", -1)
    nearest = OTHER_ALGOS.get(algo) if isinstance(algo, str) else None
    if nearest is not None:
        raise ConfigError(f"algo {algo!r} is not supported; the nearest is {nearest}")
    for key, value in config.items():
        if key in FIXED_KEYS and FIXED_KEYS[key][1] and value not in FIXED_KEYS[key][0]:
            raise ConfigError(f"{key} = {json.dumps(value)} is not supported: {FIXED_KEYS[key][1]}")
        if key not in FIXED_KEYS and key not in OWN_KEYS:
            raise ConfigError(f"{key}: unknown; it takes {', '.join(sorted(OWN_KEYS))}")
    if algo in ("lora", "locon"):
        raise ConfigError(
            'algo "lora" is a LoRA: use lora_type "standard" with lora_rank and lora_alpha'
        )
    if algo not in ALGOS:
        raise ConfigError(
            f"algo = {json.dumps(algo)} is not supported; allowed: {', '.join(ALGOS)}"
        )
    alpha = config.get("linear_alpha") or dim
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in (dim, factor))
    if not whole or not 1 <= dim <= 1_000_000 or not (factor == -1 or 1 <= factor <= 1024):
        raise ConfigError(
            "linear_dim must be a whole number from 1, factor one from 1 to 1024 or -1"
        )
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha <= 1_000_000:
        raise ConfigError(f"linear_alpha = {json.dumps(alpha)} is not a number above 0")
    flags = [config.get(name, False) for name in ("full_matrix", "decompose_both")]
    if not all(isinstance(flag, bool) for flag in flags):
        raise ConfigError("full_matrix and decompose_both must be true or false")
    if algo == "loha" and ("factor" in config or any(flags) or dim > 8192):
        raise ConfigError(
            "loha takes only linear_dim up to 8192 and linear_alpha; the other keys are for lokr"
        )
    return LycorisConfig(algo, dim, float(alpha), factor, *flags)


def read_lycoris_file(path: str) -> dict[str, Any]:
    """Return the object in a file, unchecked; see `parse_lycoris_config`."""
    try:
        config = json.loads(read_bounded_text(Path(path), MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold one object, {{...}}")
    return config
